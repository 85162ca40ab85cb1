"""`/metrics`: parses, is documented name by name, and its totals survive a restart."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from flyball.app.metrics import exposition
from tests.app._http import served
from tests.app._runtime import SetClock, calls, incident, started, take
from tests.app.test_http import ndjson

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def samples(page: bytes) -> dict[tuple[str, str], float]:
    """Value by name and label values."""
    return {
        (s.name, ",".join(s.labels.values())): s.value
        for family in text_string_to_metric_families(page.decode())
        for s in family.samples
    }


def test_what_was_received_rejected_and_done_is_told(tmp_path: Path) -> None:
    clock = SetClock()
    with served(tmp_path, clock) as (client, runtime):
        incident(runtime, clock)
        client.post("/v1/events", content=ndjson(calls(5, prefix="m")) * 2 + b"nonsense")
        assert runtime.wait_for(runtime.appended)
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = samples(answer.content)
        assert found["flyball_received_events_total", "native"] == 2410
        assert found["flyball_rejected_events_total", "json"] == 1
        assert found["flyball_events_total", "llm_call"] == 2405
        assert found["flyball_duplicate_calls_total", ""] == 5
        assert found["flyball_incidents_total", ""] == 1
        assert found["flyball_pages_total", ""] == 1
        assert found["flyball_directives_granted_total", ""] == 1
        assert found["flyball_live_directives", ""] == 1
        assert found["flyball_decisions_total", "run"] == 1
        assert found["flyball_windows_total", ""] == 3
        assert found["flyball_lag_seconds", ""] == 0
        assert found["flyball_disabled_detectors", ""] == 0


def test_every_metric_is_documented_and_every_documented_one_is_there(tmp_path: Path) -> None:
    with started(tmp_path) as runtime:
        page = exposition(runtime).decode()
    families = {
        f.name + ("_total" if f.type == "counter" else "") for f in text_string_to_metric_families(page)
    }
    of_every_process, *_ = DOCS.read_text().split("\n## ")
    documented = set(re.findall(r"^\| `(flyball_\w+)`", of_every_process, re.MULTILINE))
    assert families == documented
    assert all(f.documentation.endswith(".") for f in text_string_to_metric_families(page))


def test_totals_survive_a_restart(tmp_path: Path) -> None:
    clock = SetClock()
    with started(tmp_path, clock) as runtime:
        incident(runtime, clock)
        take(runtime, calls(5, clock.at, prefix="m"))
        runtime.stop()
        before = samples(exposition(runtime))
    with started(tmp_path, clock) as again:
        after = samples(exposition(again))
    # Seconds spent are of the process, not of the data.
    assert {k: v for k, v in after.items() if "stage_seconds" not in k[0]} == {
        k: v for k, v in before.items() if "stage_seconds" not in k[0]
    }


def test_a_label_of_an_event_never_becomes_a_label_of_a_metric(tmp_path: Path) -> None:
    """Else a label explosion of the events were one of whoever scrapes."""
    with started(tmp_path) as runtime:
        take(runtime, calls(5, model='evil"} 1\n', tenant="acme"))
        page = exposition(runtime)
    assert b"evil" not in page
    assert b"acme" not in page
