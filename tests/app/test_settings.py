"""The settings file: where its paths count from."""

from __future__ import annotations

from pathlib import Path

import yaml

from flyball.app.settings import load
from flyball.app.starter import files


def test_paths_of_the_settings_file_count_from_the_file(tmp_path: Path) -> None:
    config = tmp_path / "etc" / "flyball.yaml"
    config.parent.mkdir()
    config.write_text("data: state\nrunbooks: [books, /srv/books]\nnotify: {templates: texts}\n")
    settings = load(config)
    assert settings.data == config.parent / "state"
    assert settings.runbooks == [config.parent / "books", Path("/srv/books")]
    assert settings.notify.templates == config.parent / "texts"


def test_paths_of_the_command_line_count_from_where_one_stands(tmp_path: Path) -> None:
    config = tmp_path / "flyball.yaml"
    config.write_text("data: state\n")
    assert load(config, data=Path("here")).data == Path("here")


def test_the_settings_that_init_writes_are_right_also_with_every_comment_taken_off(tmp_path: Path) -> None:
    text = files()["flyball.yaml"]
    (tmp_path / "runbooks").mkdir()
    config = tmp_path / "flyball.yaml"
    config.write_text(text)
    load(config)
    shown = [
        line[2:] for line in text.splitlines() if line.startswith("# ") and (":" in line or "- " in line)
    ]
    start = next(i for i, line in enumerate(shown) if line == "notify:")
    sample = "\n".join(line for line in shown[start:] if line[0] == " " or line in ("notify:", "scrape:"))
    config.write_text(sample.replace("{env: SLACK_WEBHOOK_URL}", "https://hooks.example.com/x"))
    settings = load(config)
    assert [c.kind for c in settings.notify.channels] == ["slack"]
    assert len(settings.scrape) == 2
    assert yaml.safe_load(text)["mode"] == settings.mode
