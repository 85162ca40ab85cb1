"""Settings: every wrong one is told at once, with where it stands; secrets never show."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyball.app.settings import Settings, is_loopback, load, unknown_variables
from flyball.app.wiring import pipeline_config
from flyball.core.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "flyball.yaml"
    path.write_text(text)
    return path


def loaded(
    config: Path | None = None, environ: dict[str, str] | None = None, **overrides: object
) -> Settings:
    return load(config, environ=environ or {}, **overrides)


def refusal(config: Path | None = None, environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as e:
        loaded(config, environ, **overrides)
    return str(e.value)


def test_without_anything_there_are_defaults() -> None:
    found = loaded()
    assert (found.host, found.port, found.mode) == ("127.0.0.1", 4390, "suggest")
    assert (found.window_s, found.lateness_s, found.max_delay_s) == (10.0, 2.0, 15.0)


def test_the_command_line_wins_over_variables_and_these_over_the_file(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    path = written(tmp_path, "port: 1\nmode: observe\nwindow_s: 5\n")
    environ["FLYBALL_PORT"] = "2"
    environ["FLYBALL_MODE"] = "approve"
    found = loaded(path, environ, port=3)
    assert (found.port, found.mode, found.window_s) == (3, "approve", 5.0)


def test_every_wrong_setting_is_listed_in_one_message_with_its_source(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    path = written(
        tmp_path, "port: 99999\nmoed: auto\nlimits:\n  body_byte: 5\n  pending_bytes: -1\nwindow_s: abc\n"
    )
    environ["FLYBALL_MODE"] = "autp"
    environ["FLYBALL_LIMITS__BACKLOG_BYTES"] = "lots"
    environ["FLYBALL_RETENTION"] = "{bad"
    said = refusal(path, environ, cooldown_s=-1)
    assert said.startswith("9 settings are wrong:")
    for expected in (
        f"port ({path}:1:7): ", f"moed ({path}:2:1): no such setting; did you mean 'mode'?",
        f"limits.body_byte ({path}:4:3): no such setting", f"limits.pending_bytes ({path}:5:18): ",
        f"window_s ({path}:6:11): ", "mode (FLYBALL_MODE): input should be 'observe'",
        "limits.backlog_bytes (FLYBALL_LIMITS__BACKLOG_BYTES): ", "retention (FLYBALL_RETENTION): ",
    ):  # fmt: skip
        assert expected in said, (expected, said)
    assert "cooldown_s (command line): " in said


def test_values_are_shown_but_never_those_of_secrets(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    secret = "hush-12345"
    path = written(
        tmp_path,
        f"port: none\nhash_key: [{secret}]\ntokens:\n  - {{name: x, token: {secret}, roles: [{secret}]}}\n"
        f"notify:\n  channels:\n    - {{kind: slack, url: {secret}}}\n",
    )
    said = refusal(path, environ)
    assert "'none'" in said
    assert secret not in said
    assert "tokens.0.token" in said
    environ["FLYBALL_TOKENS"] = f'[{{"name": "x", "token": "{secret}"}}]'
    assert secret not in refusal(environ=environ)
    environ["FLYBALL_TOKENS"] = f"[{secret}"
    assert secret not in refusal(environ=environ)


def test_settings_show_no_secret_when_printed() -> None:
    settings = Settings.model_validate(
        {
            "hash_key": "hush-12345",
            "tokens": [{"name": "x", "token": "hush-1234567890abcdef", "roles": ["read"]}],
        }
    )
    assert "hush" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


@pytest.mark.parametrize(
    "value", ["one:two/three", "one,two/three", '["one", "two/three"]', "one:two/three:", " one : two/three "]
)
def test_runbooks_in_a_variable_are_a_list_of_paths(value: str) -> None:
    environ: dict[str, str] = {}
    environ["FLYBALL_RUNBOOKS"] = value
    assert loaded(environ=environ).runbooks == [Path("one"), Path("two/three")]


def test_one_runbook_in_the_file_needs_no_list(tmp_path: Path) -> None:
    assert loaded(written(tmp_path, "runbooks: mine\n")).runbooks == [Path("mine")]


def test_groups_and_lists_are_set_by_variables() -> None:
    environ: dict[str, str] = {}
    environ["FLYBALL_LIMITS__BODY_BYTES"] = "1000"
    environ["FLYBALL_RETENTION"] = '{"log_s": 60}'
    environ["FLYBALL_SCRAPE"] = '[{"url": "http://gpu-1:9400/metrics", "every_s": 5}]'
    found = loaded(environ=environ)
    assert (found.limits.body_bytes, found.retention.log_s) == (1000, 60.0)
    assert found.limits.memory_events == 200_000
    assert found.scrape[0].every_s == 5.0


def test_a_group_of_file_and_variables_is_one(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    environ["FLYBALL_LIMITS__BODY_BYTES"] = "1000"
    found = loaded(written(tmp_path, "limits: {memory_events: 7}\n"), environ)
    assert (found.limits.body_bytes, found.limits.memory_events) == (1000, 7)


def test_damaged_json_deep_in_a_variable_names_the_variable() -> None:
    environ: dict[str, str] = {}
    environ["FLYBALL_NOTIFY__CHANNELS"] = "[{hush"
    said = refusal(environ=environ)
    assert "FLYBALL_NOTIFY__CHANNELS" in said
    assert "hush" not in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port: 1\nport: 2\n", ":2:1"),
        ("port: [1\n", "not YAML"),
        ("- a\n", "holds no settings"),
        ("just words", "holds no settings"),
    ],
)
def test_a_file_that_is_no_settings_is_refused_with_the_place(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = written(tmp_path, text)
    said = refusal(path)
    assert expected in said
    assert str(path) in said


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n  # nor here\n"])
def test_a_file_of_comments_changes_nothing(tmp_path: Path, text: str) -> None:
    assert loaded(written(tmp_path, text)) == loaded()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "name an existing file" in refusal(tmp_path / "none.yaml")


def test_a_secret_may_stand_in_a_variable_that_the_file_names(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    path = written(tmp_path, "hash_key: {env: MY_KEY}\n")
    assert "MY_KEY is not set" in refusal(path, environ)
    environ["MY_KEY"] = "hush"
    assert loaded(path, environ).hash_key.get_secret_value() == "hush"


def test_another_address_than_loopback_needs_tokens() -> None:
    assert "0.0.0.0 needs `tokens`" in refusal(host="0.0.0.0")
    token = {"name": "x", "token": "x" * 20, "roles": ["read"]}
    assert loaded(host="0.0.0.0", tokens=[token]).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.0.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.com", False)],
)  # fmt: skip
def test_loopback_is_told_by_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_settings_that_do_not_fit_together_are_told_together() -> None:
    said = refusal(host="0.0.0.0", lateness_s=30.0)
    assert said.startswith("2 settings are wrong")
    assert "max_delay_s" in said


def test_variables_that_set_nothing_are_told_but_not_those_that_kubernetes_sets() -> None:
    environ = {
        "FLYBALL_MOED": "auto", "FLYBALL_MODE": "auto", "FLYBALL_LIMITS__BODY_BYTES": "1", "FLYBALL_URL": "x",
        "FLYBALL_SERVICE_HOST": "10.0.0.1", "FLYBALL_PORT_4390_TCP": "tcp://10.0.0.1:4390", "OTHER": "x",
    }  # fmt: skip
    assert unknown_variables(environ) == ["FLYBALL_MOED sets nothing; did you mean 'FLYBALL_MODE'?"]


def test_the_port_that_kubernetes_sets_for_a_service_is_explained() -> None:
    environ: dict[str, str] = {}
    environ["FLYBALL_PORT"] = "tcp://10.0.0.1:4390"
    assert "enableServiceLinks" in refusal(environ=environ)


def test_paths_of_the_settings_file_count_from_the_file(tmp_path: Path) -> None:
    config = tmp_path / "etc" / "flyball.yaml"
    config.parent.mkdir()
    config.write_text(
        "data: state\nrunbooks: [books, /srv/books]\nnotify: {templates: texts}\nkafka: {ca_file: ca.pem}\n"
    )
    settings = load(config, environ={})
    assert settings.data == config.parent / "state"
    assert settings.runbooks == [config.parent / "books", Path("/srv/books")]
    assert settings.notify.templates == config.parent / "texts"
    assert settings.kafka.ca_file == config.parent / "ca.pem"


def test_paths_of_the_command_line_count_from_where_one_stands(tmp_path: Path) -> None:
    config = tmp_path / "flyball.yaml"
    config.write_text("data: state\n")
    assert load(config, environ={}, data=Path("here")).data == Path("here")


def test_what_concerns_the_window_stage_reaches_it_and_what_cannot_be_is_refused() -> None:
    environ = {"FLYBALL_KAFKA": "k:9092", "FLYBALL_KAFKA_STALL_S": "7", "FLYBALL_KAFKA_POISON_RATIO": "0.25"}
    found = loaded(environ=environ)
    assert (found.kafka.stall_s, found.kafka.poison_ratio) == (7.0, 0.25)
    assert pipeline_config(found).stall_s == 7.0
    said = refusal(environ={"FLYBALL_KAFKA_POISON_RATIO": "2", "FLYBALL_KAFKA_STUCK_S": "0"})
    assert "poison_ratio" in said
    assert "stuck_s" in said
