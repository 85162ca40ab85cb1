"""Hot reload: a new set of runbooks counts from its record on; a refused one leaves what runs in place and says why."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from flyball.app.embedded import Embedded
from flyball.app.pipeline import Pipeline
from flyball.app.reload import RunbookWatch
from flyball.app.settings import Settings
from flyball.app.wiring import make_pipeline
from tests.app._http import served
from tests.app._runtime import SetClock, incident, started, take, well

MINE = """
runbook: v1
name: mine
owner: us
when: incident.root.kind == "provider" && incident.severity >= HIGH
mode: {mode}
steps:
  - redirect: {{from: $incident.root, to: best_healthy, share: [10%], for: 30m}}
    verify: {{within: 3m, expect: 'errors("to") < 0.05'}}
"""


def write(path: Path, text: str, at: int) -> None:
    """With a time of its own: two writes within one tick of the file system's clock are two changes here too."""
    path.write_text(text)
    os.utime(path, (at, at))


def configured(folder: Path, **more: object) -> Settings:
    return Settings.model_validate({"runbooks": [folder], "mode": "auto", **more})


def pipeline_of(settings: Settings) -> Callable[[], Pipeline]:
    return lambda: make_pipeline(settings)


def look(watch: RunbookWatch, runtime: Embedded) -> bool:
    changed = asyncio.run(watch.look())
    assert runtime.wait_for(runtime.appended)
    # Figures are published with a stretch of the log; this one has been.
    return changed


def modes(runtime: Embedded) -> dict[str, str]:
    return {r.name: r.mode for r in runtime.figures.runbooks if r.source == "directory"}


def ceiling(runtime: Embedded) -> str:
    return runtime.figures.ceiling


def test_at_the_first_start_the_runbooks_become_the_first_record_of_the_log(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    write(books / "mine.yaml", MINE.format(mode="suggest"), 1)
    settings = configured(books)
    with started(tmp_path, pipeline=pipeline_of(settings)) as runtime:
        assert look(RunbookWatch(runtime, settings), runtime)
        assert runtime.appended == 1
    with started(tmp_path, pipeline=pipeline_of(settings)) as again:
        assert not look(RunbookWatch(again, settings), again)
        assert again.appended == 1


def test_a_changed_file_counts_without_a_restart(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    write(books / "mine.yaml", MINE.format(mode="suggest"), 1)
    settings = configured(books)
    with started(tmp_path, pipeline=pipeline_of(settings)) as runtime:
        watch = RunbookWatch(runtime, settings)
        look(watch, runtime)
        assert not look(watch, runtime)
        write(books / "mine.yaml", MINE.format(mode="auto"), 2)
        assert look(watch, runtime)
        assert modes(runtime) == {"mine": "auto"}
        (books / "mine.yaml").unlink()
        assert look(watch, runtime)
        assert modes(runtime) == {}


def test_a_set_that_is_refused_leaves_the_running_one_and_says_why_until_it_is_right(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    write(books / "mine.yaml", MINE.format(mode="suggest"), 1)
    settings = configured(books)
    with served(tmp_path, pipeline=pipeline_of(settings)) as (_, runtime):
        from flyball.app.http.read import status

        watch = RunbookWatch(runtime, settings)
        look(watch, runtime)
        position = runtime.appended
        write(books / "mine.yaml", MINE.format(mode="auto").replace("severity", "sevrity"), 2)
        assert not look(watch, runtime)
        assert runtime.appended == position
        assert modes(runtime) == {"mine": "suggest"}
        (why,) = watch.refused
        assert "mine.yaml:5" in why
        assert "did you mean 'incident.severity'" in why
        assert status(runtime, watch)["runbooks_refused"] == [why]
        write(books / "mine.yaml", MINE.format(mode="auto"), 3)
        assert look(watch, runtime)
        assert watch.refused == []
        assert modes(runtime) == {"mine": "auto"}


def test_a_restart_goes_on_with_the_set_that_ran_until_the_newer_one_is_taken(tmp_path: Path) -> None:
    """The stretch of the log that is read again is judged by the runbooks that judged it the first time."""
    books = tmp_path / "books"
    books.mkdir()
    write(books / "mine.yaml", MINE.format(mode="suggest"), 1)
    settings = configured(books)
    with started(tmp_path, pipeline=pipeline_of(settings)) as runtime:
        look(RunbookWatch(runtime, settings), runtime)
    write(books / "mine.yaml", MINE.format(mode="auto"), 2)
    stricter = configured(books, mode="observe")
    with started(tmp_path, pipeline=pipeline_of(stricter)) as again:
        assert modes(again) == {"mine": "suggest"}
        assert ceiling(again) == "auto"
        assert look(RunbookWatch(again, stricter), again)
        assert modes(again) == {"mine": "auto"}
        assert ceiling(again) == "observe"


def test_the_next_tick_judges_an_open_incident_by_the_new_set(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    settings = configured(books, modes={"provider-failover": "observe"})
    clock = SetClock()
    with started(tmp_path, clock, pipeline=pipeline_of(settings)) as runtime:
        watch = RunbookWatch(runtime, settings)
        look(watch, runtime)
        incident(runtime, clock)
        before = {w.plan.runbook for w in runtime.figures.waiting}
        assert "mine" not in before
        write(books / "mine.yaml", MINE.format(mode="suggest"), 1)
        assert look(watch, runtime)
        clock.at += 1.0
        take(runtime, well(clock.at, 1))
        assert runtime.wait_for(runtime.tick().result(30))
        assert "mine" in {w.plan.runbook for w in runtime.figures.waiting}


def test_a_mode_may_be_set_for_one_runbook_here(tmp_path: Path) -> None:
    settings = configured(tmp_path, modes={"provider-failover": "auto"})
    books = tmp_path / "books"
    books.mkdir()
    with started(books, pipeline=pipeline_of(settings)) as runtime:
        assert runtime.figures.runbooks.by_name["provider-failover"].mode == "auto"
