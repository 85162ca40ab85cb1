"""What `flyball doctor` looks at: this machine, the settings, the data folder, and a running Flyball if there is one."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import httpx
from sqlalchemy.exc import DatabaseError

from flyball.app.settings import Settings, load, unknown_variables
from flyball.app.store import ledger, owner, store
from flyball.app.store.database import reading
from flyball.app.store.sqlite import has_wal_reset_fault, schema_of
from flyball.app.wiring import database_of, runbooks_of
from flyball.core.errors import ConfigError, FlyballError
from flyball.remediation.actions.hook import Hook

_LOW_DISK_BYTES: Final = 2 << 30
_MANY_DUPLICATES: Final = 0.05


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `bad` must be mended, `warn` should be."""

    check: str
    level: Literal["ok", "warn", "bad"]
    what: str
    mend: str = ""


def examine(config: Path | None, url: str, token: str) -> list[Finding]:
    findings = [Finding("python", "ok", platform.python_version()), _sqlite()]
    try:
        settings = load(config)
    except ConfigError as e:
        return [*findings, Finding("settings", "bad", str(e), "correct the settings named")]
    findings.append(Finding("settings", "ok", str(config) if config else "defaults and FLYBALL_ variables"))
    findings += [
        Finding("settings", "warn", w, "correct the variable's name") for w in unknown_variables(os.environ)
    ]
    findings += _runbooks(settings)
    findings += _data(settings)
    findings += _notify(settings)
    findings += _kafka(settings)
    return [*findings, *_running(url, token)]


def _sqlite() -> Finding:
    version = sqlite3.sqlite_version
    if has_wal_reset_fault():
        return Finding(
            "sqlite",
            "warn",
            f"{version} has the WAL-reset fault (3.7.0 to 3.51.2), which needs two writing connections; Flyball uses one",
            "open the database with other tools only read-only while Flyball runs, or use a Python with SQLite 3.51.3",
        )
    return Finding("sqlite", "ok", version)


def _runbooks(settings: Settings) -> Iterator[Finding]:
    try:
        found = runbooks_of(settings)
    except ConfigError as e:
        yield Finding(
            "runbooks", "bad", str(e), "correct the file named; a running Flyball keeps the set it has"
        )
        return
    names = ", ".join(f"{b.name} ({b.mode})" for b in found)
    yield Finding("runbooks", "ok", f"{names}; ceiling {settings.mode}")
    hooks = {h.name for h in settings.hooks}
    missing = sorted(
        f"{b.name} asks {call.name!r}"
        for b in found
        for step in b.steps
        if isinstance(call := step.params, Hook.Params)
        and call.name not in hooks
        # A shipped one that only suggests is nobody's fault.
        and (b.source == "directory" or b.mode in ("approve", "auto"))
    )
    if missing:
        yield Finding(
            "hooks",
            "warn",
            f"no hook of that name is set: {', '.join(missing)}; such a step is not carried out",
            "add it under `hooks` in the settings",
        )


def _data(settings: Settings) -> Iterator[Finding]:
    parent = next(p for p in (settings.data.absolute(), *settings.data.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < _LOW_DISK_BYTES:
        yield Finding(
            "disk", "warn", f"{free >> 20} MiB free at {parent}", "free some, or lower retention.log_bytes"
        )
    else:
        yield Finding("disk", "ok", f"{free >> 30} GiB free at {parent}")
    where = database_of(settings)
    if isinstance(where, Path) and not where.exists():
        yield Finding("database", "ok", f"none yet at {where}; `flyball run` makes it")
        return
    name = str(where) if isinstance(where, Path) else "PostgreSQL"
    try:
        with reading(where) as c:
            broken = ledger.verify_ledger(c)
            position = store.position(c)
            schema, epoch, who = schema_of(c), *owner.current(c)
    except FlyballError as e:  # does not answer, or was not migrated
        yield Finding("database", "bad", str(e), "see docs/operating.md")
        return
    except (DatabaseError, ValueError) as e:
        why = e.orig if isinstance(e, DatabaseError) else e
        yield Finding("database", "bad", f"{name} cannot be read ({why})", "move it away and restore a copy")
        return
    if broken is not None:
        yield Finding(
            "ledger", "bad", f"was changed at or before line {broken}", "find out who wrote to the database"
        )
    taken = f", last taken by {who} (epoch {epoch})" if who else ""
    yield Finding("database", "ok", f"{name}, schema {schema}, position {position}{taken}")


def _notify(settings: Settings) -> Iterator[Finding]:
    if settings.notify.channels:
        yield Finding("notify", "ok", f"{len(settings.notify.channels)} channel(s)")
    else:
        yield Finding(
            "notify",
            "warn",
            "no channel is set: nobody is told of incidents",
            "add `notify.channels` (docs/alerts.md)",
        )


def _kafka(settings: Settings) -> Iterator[Finding]:
    """The cluster, where one is set: reach, version, topics and how they are kept, clocks."""
    if not settings.kafka.bootstrap:
        return
    from flyball.streams.kafka import admin

    try:
        config = settings.kafka.config()
        problems = admin.check_cluster(config, admin.wanted(settings.kafka.partitions))
        yield from (Finding(f"kafka {p.check}", p.level, p.what, p.mend) for p in problems)
        if any(p.check == "address" for p in problems):
            return
        with admin.connected(config) as client:
            version = ".".join(map(str, admin.broker_version(client)))
            brokers = len(admin.live_brokers(client))
        yield Finding("kafka", "ok", f"{config.bootstrap}, {brokers} broker(s) of version {version}")
        for p in admin.check_clock(config):
            yield Finding(f"kafka {p.check}", p.level, p.what, p.mend)
    except FlyballError as e:
        yield Finding("kafka", "warn", str(e))


def _running(url: str, token: str) -> Iterator[Finding]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = httpx.get(f"{url}/v1/status", headers=headers, timeout=5.0)
    except (httpx.TransportError, httpx.InvalidURL) as e:
        yield Finding(
            "running", "warn", f"no answer from {url} ({type(e).__name__})", "start it with `flyball run`"
        )
        return
    if response.status_code != 200:
        yield Finding(
            "running",
            "bad",
            f"{url} answers {response.status_code}",
            "give a token with the read role: --token",
        )
        return
    status: dict[str, Any] = response.json()
    yield Finding("running", "ok" if status["ready"] else "bad", f"{url}, position {status['position']}")
    yield from _traffic(status)


def _acting(status: dict[str, Any]) -> Iterator[Finding]:
    """What keeps Flyball from acting as its runbooks say, and what it failed over."""
    if status["stopped"]:
        yield Finding(
            "stopped",
            "warn",
            f"the kill switch is on for {', '.join(status['stopped'])}",
            "flyball resume SCOPE",
        )
    if status["left_out"]:
        yield Finding(
            "faults",
            "bad",
            f"{status['left_out']} records were left out because a stage failed over them; the last: {status['left_out_why']}",
            "report it with the record: flyball dead-letters list",
        )
    if status["runbooks_refused"]:
        yield Finding(
            "reload",
            "bad",
            f"newer files are refused, the set before them runs: {'; '.join(status['runbooks_refused'][:3])}",
            "correct the file named: flyball runbook lint",
        )
    if status["waiting"]:
        yield Finding("approvals", "ok", f"{status['waiting']} wait for a person: flyball approvals")


def _traffic(status: dict[str, Any]) -> Iterator[Finding]:
    calls = status["events"].get("llm_call", 0)
    if not status["events"]:
        yield Finding(
            "traffic", "warn", "no event has arrived", "see `flyball init` for the lines that send some"
        )
    copies = status["duplicates"]
    if calls and copies > _MANY_DUPLICATES * calls:
        yield Finding(
            "copies",
            "warn",
            f"{copies:,} copies of {calls:,} calls: two reporters tell the same calls",
            "switch one of them off; Flyball counts the first, but pays for reading both",
        )
    for sender, skew_s in sorted(status.get("clock_skew", {}).items()):
        yield Finding(
            "clock",
            "warn",
            f"{sender} is {skew_s:+.1f} s off; its times are corrected",
            "set its clock (NTP)",
        )
    for kind, why in status["disabled_detectors"].items():
        yield Finding(
            "detector", "bad", f"{kind} is switched off: {why}", "report it; a restart switches it on again"
        )
    yield from _acting(status)
    if status["rejected"]:
        total = sum(status["rejected"].values())
        yield Finding(
            "rejected", "warn", f"{total:,} events could not be taken", "see why: flyball dead-letters list"
        )
    if status["lag_s"] > 30:
        yield Finding(
            "lag", "bad", f"the stages are {status['lag_s']:.0f} s behind", "give the process a faster core"
        )
