"""`flyball run` as a process: killed under load, stopped, refused, failing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from flyball.app.store.sqlite import open_reader
from flyball.app.store.store import iter_log
from flyball.core.codec import decode_events
from tests.processes import eventually, flyball, free_port, running, stop, wait_for


def body(numbers: range) -> bytes:
    now = time.time()
    lines = [
        {"type": "llm_call", "at": now, "id": f"call-{i}", "provider": "a", "model": "m", "input_tokens": 10}
        for i in numbers
    ]
    return "\n".join(map(json.dumps, lines)).encode()


class Load:
    """Posts bodies one after another until told to end; remembers which were acknowledged."""

    def __init__(self, url: str, first: int) -> None:
        self._url, self._next = url, first
        self.acknowledged: list[int] = []
        self.enough = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._post)
        self._thread.start()

    def _post(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10.0) as client:
            while not self._stop.is_set():
                numbers = range(self._next, self._next + 20)
                self._next += 20
                try:
                    answer = client.post("/v1/events", content=body(numbers))
                except httpx.TransportError:
                    return  # killed: whether this body is there nobody knows, and nobody was told
                if answer.status_code == 200:
                    self.acknowledged += numbers
                    if len(self.acknowledged) >= 600:
                        self.enough.set()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)


def run_command(folder: Path, port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "flyball.app",
        "run",
        "--port",
        str(port),
        "--data",
        str(folder / "data"),
    ]


@contextmanager
def started(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with running(
        run_command(folder, port), f"http://127.0.0.1:{port}/readyz", folder / "flyball.log"
    ) as process:
        yield process


def stored(folder: Path) -> list[str]:
    """Ids of all events in the log, in order."""
    engine = open_reader(folder / "data" / "flyball.sqlite3")
    found = [
        e.id  # type: ignore[union-attr]
        for row in iter_log(engine, 0, 1 << 60)
        if row.kind == "events"
        for e in decode_events(row.body)
    ]
    engine.dispose()
    return found


def test_killed_under_load_again_and_again_nothing_acknowledged_is_lost_and_nothing_counts_twice(
    tmp_path: Path,
) -> None:
    port, acknowledged, first = free_port(), [], 0
    for _ in range(3):
        with started(tmp_path, port) as process:
            loads = [Load(f"http://127.0.0.1:{port}", first + k * 1_000_000) for k in range(3)]
            for load in loads:
                assert load.enough.wait(60)
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            for load in loads:
                load.end()
                acknowledged += load.acknowledged
        first += 10_000_000
    with started(tmp_path, port):
        url = f"http://127.0.0.1:{port}/v1/status"
        assert eventually(lambda: httpx.get(url).json()["lag_bytes"] == 0)
        status = httpx.get(url).json()
    in_log = stored(tmp_path)
    assert len(in_log) == len(set(in_log))
    assert {f"call-{i}" for i in acknowledged} <= set(in_log)
    assert status["events"] == {"llm_call": len(in_log)}
    assert status["duplicates"] == 0


def test_sigterm_drains_and_exits_with_0(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port) as process:
        for i in range(20):
            httpx.post(f"http://127.0.0.1:{port}/v1/events", content=body(range(i * 100, i * 100 + 100)))
        assert stop(process) == 0
    with sqlite3.connect(tmp_path / "data" / "flyball.sqlite3") as c:
        (position,) = c.execute("select value from meta where key = 'position'").fetchone()
        (newest,) = c.execute("select max(id) from log").fetchone()
        (snapshot,) = c.execute("select max(position) from snapshots").fetchone()
    c.close()
    assert int(position) == newest == snapshot
    assert '"drained": true' in (tmp_path / "flyball.log").read_text()


def test_ctrl_c_ends_it_cleanly_while_a_long_poll_waits(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port) as process:
        url = f"http://127.0.0.1:{port}/v1/directives"
        known = httpx.get(url).headers["etag"]
        answers: list[int] = []

        def poll() -> None:
            with contextlib.suppress(httpx.ConnectError):  # it came too late: the process has stopped
                answer = httpx.get(url, params={"wait": 60}, headers={"if-none-match": known}, timeout=90.0)
                answers.append(answer.status_code)

        poller = threading.Thread(target=poll)
        poller.start()
        httpx.get(url)  # answered after the poll has come in
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        poller.join(30)
    assert answers in ([304], [])
    assert "Traceback" not in (tmp_path / "flyball.log").read_text()


def test_time_passes_while_nothing_arrives(tmp_path: Path) -> None:
    with flyball(tmp_path) as url:
        assert eventually(lambda: httpx.get(f"{url}/v1/status").json()["position"] >= 2)
        assert httpx.get(f"{url}/v1/status").json()["events"] == {}


def test_when_the_log_fails_the_process_ends_with_1_and_one_clear_line(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port) as process:
        with sqlite3.connect(tmp_path / "data" / "flyball.sqlite3", timeout=30) as c:
            c.execute("drop table log")
        c.close()
        assert process.wait(60) == 1
    assert "flyball: stopped by OperationalError" in (tmp_path / "flyball.log").read_text()


# --- refused --------------------------------------------------------------------------------------------------------


def refused(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What `flyball run` says when it does not start: one message, exit code 2, no stack trace."""
    done = subprocess.run(
        [sys.executable, "-m", "flyball.app", "run", *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("flyball: ")
    assert done.stdout == ""
    return done.stderr


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("--port", str(port), "--data", str(tmp_path / "data"))
    assert (
        said == f"flyball: port: {port} is taken on 127.0.0.1; stop what listens there, or set another port\n"
    )
    assert not (tmp_path / "data").exists()


def test_an_address_of_another_machine_is_one_line(tmp_path: Path) -> None:
    token = json.dumps([{"name": "x", "token": "x" * 20, "roles": ["admin"]}])
    said = refused("--host", "192.0.2.1", "--data", str(tmp_path), env={"FLYBALL_TOKENS": token})
    assert "192.0.2.1" in said
    assert said.count("\n") == 1


def test_a_data_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "below"):
        said = refused("--port", str(free_port()), "--data", str(folder))
        assert "set `data`" in said
        assert said.count("\n") == 1


def test_a_folder_of_another_flyball_is_one_line_that_names_it(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port) as process:
        said = refused("--port", str(free_port()), "--data", str(tmp_path / "data"))
        assert f"in use by the Flyball of process {process.pid}" in said
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


def test_a_refused_runbook_stops_the_start_with_file_and_line(tmp_path: Path) -> None:
    book = tmp_path / "mine.yaml"
    book.write_text("runbook: v1\nname: mine\nwhen: incident.sigal == 'x'\n")
    said = refused("--port", str(free_port()), "--data", str(tmp_path / "data"), "--runbooks", str(book))
    assert f"{book}:" in said


def test_wrong_settings_stop_the_start(tmp_path: Path) -> None:
    said = refused("--mode", "autp", "--port", "99999")
    assert "2 settings are wrong" in said


def test_a_process_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    """The tests' own helper: otherwise a failure here would be a riddle."""
    log = tmp_path / "log"
    process: Any = subprocess.Popen([sys.executable, "-c", "print('why', flush=True)"], stdout=log.open("wb"))
    process.wait(30)
    try:
        wait_for("http://127.0.0.1:9/", process, log, deadline_s=0.1)
    except AssertionError as e:
        said = str(e)
    assert "why" in said
