"""Real PostgreSQL for tests and benchmarks: Debian's programs, on loopback, with a folder and a user of its own.

By hand, until Ctrl-C: `python -m tests.servers.postgres`; then, elsewhere, `FLYBALL_TEST_POSTGRES=postgresql://… python -m pytest …`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy import make_url

from flyball.app.store import migrate
from tests.processes import eventually, free_port

USER: Final = "flyball"
PASSWORD: Final = "flyball-secret"
_NOBODY: Final = ("postgres", "nobody")
"""Who runs the server where we are root, which it refuses."""


class CannotStart(Exception):
    """PostgreSQL cannot be had here; the text says why."""


class Postgres:
    """A server. Each test takes a database of its own.

    Args:
        url: of a role that may make databases.
        pid: of the server's first process; None when somebody else started it.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url, self.pid = url, pid
        self._prefix = f"flyball_test_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._template = ""

    def named(self, name: str) -> str:
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def empty(self) -> str:
        """Address of a new database without tables."""
        return self._made("template0")

    def migrated(self) -> str:
        """Address of a new database with Flyball's tables."""
        if not self._template:
            url = self.empty()
            migrate.upgrade(url)
            self._template = str(make_url(url).database)
        return self._made(self._template)

    def _made(self, template: str) -> str:
        name = f"{self._prefix}_{next(self._numbers)}"
        self.say(f"create database {name} template {template}")
        return self.named(name)

    def say(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as c:
            cursor = c.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def drop_all(self) -> None:
        for (name,) in self.say(f"select datname from pg_database where datname like '{self._prefix}%'"):
            self.say(f"drop database {name} with (force)")


def programs() -> Path:
    """Folder of `initdb` and `postgres`. Raises: CannotStart."""
    config = shutil.which("pg_config")
    folders = []
    if config is not None:
        folders.append(
            Path(
                subprocess.run(
                    [config, "--bindir"], capture_output=True, text=True, check=True
                ).stdout.strip()
            )
        )
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise CannotStart("initdb is not installed (Debian: apt-get install postgresql)")


def _somebody() -> dict[str, Any]:
    """How to start a process as somebody who is not root."""
    if os.getuid() != 0:
        return {}
    for name in _NOBODY:
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise CannotStart(f"it refuses root, and there is no user {' or '.join(_NOBODY)}")


@contextlib.contextmanager
def server(*settings: str) -> Iterator[Postgres]:
    """A server of our own for as long as the block lasts. Raises: CannotStart.

    Args:
        settings: `name=value` of the server, beside ours.
    """
    bin_folder, somebody = programs(), _somebody()
    folder = Path(tempfile.mkdtemp(prefix="flyball-postgres-"))
    try:
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if somebody:
            for path in (folder, secret):
                os.chown(path, somebody["user"], somebody["group"])
        data = folder / "data"
        made = subprocess.run(
            [
                bin_folder / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-N",
                "-E", "UTF8", "--locale=C.UTF-8",
            ],
            cwd=folder, capture_output=True, text=True, **somebody,
        )  # fmt: skip
        if made.returncode != 0:
            raise CannotStart(f"initdb says: {made.stderr.strip()[-500:]}")
        port = free_port()
        # Only its processes are killed here, never the machine: what it handed to the kernel stays.
        ours = [
            f"port={port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={folder}",
            "fsync=off",
            *settings,
        ]
        log = folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [bin_folder / "postgres", "-D", data, *(part for s in ours for part in ("-c", s))],
                cwd=folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL, **somebody,
            )  # fmt: skip
        found = Postgres(f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres", process.pid)
        try:
            if (
                not eventually(lambda: _answers(found.url) or process.poll() is not None, 30)
                or process.poll() is not None
            ):
                raise CannotStart(f"postgres says: {log.read_text(errors='replace').strip()[-500:]}")
            yield found
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url, connect_timeout=2):
        return True
    return False


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """The server at FLYBALL_TEST_POSTGRES if that is set, else one of our own. Raises: CannotStart."""
    given = os.environ.get("FLYBALL_TEST_POSTGRES")
    if not given:
        with server() as own:
            yield own
        return
    if not _answers(given):
        raise CannotStart("nothing answers at FLYBALL_TEST_POSTGRES")
    found = Postgres(given)
    try:
        yield found
    finally:
        found.drop_all()


if __name__ == "__main__":
    with server() as _own:
        print(f"FLYBALL_TEST_POSTGRES={_own.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
