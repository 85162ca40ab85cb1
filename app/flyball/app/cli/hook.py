"""`flyball hook …`: what a platform team tries its remediation hook with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from flyball.app.cli._common import AsJson, Unreachable, print_json
from flyball.core.errors import ConfigError

if TYPE_CHECKING:
    from flyball.remediation.hooks.kit import Check

Callback = tuple[str, dict[str, str], bytes]

_UP_WITHIN_S = 30.0
_CALLBACK_BYTES = 256 * 1024


def add_to(app: typer.Typer) -> None:
    hook = typer.Typer(help="Remediation hooks of platform teams.", no_args_is_help=True)
    # With one command Typer would drop its name.
    hook.callback()(_hook)
    hook.command("conform")(conform)
    app.add_typer(hook, name="hook")


def _hook() -> None:
    """Remediation hooks of platform teams.

    Examples:

      flyball hook conform --help

      flyball hook conform https://hooks.example.com/nodes --action drain --target test-node-1
    """


def conform(
    url: Annotated[str, typer.Argument(help="Address of the hook.")],
    action: Annotated[str, typer.Option(help="Action to order; it is carried out for real, and undone.")],
    target: Annotated[
        list[str], typer.Option(help="What it is carried out on: something for tests; may be repeated.")
    ],
    secret: Annotated[
        str,
        typer.Option(
            envvar="HOOK_SECRET",
            help="The secret that the hook shares with Flyball; better in the variable.",
            show_default="",
        ),
    ] = "",
    params: Annotated[str, typer.Option(help="Parameters of the action, as JSON.")] = "{}",
    command: Annotated[
        str,
        typer.Option(
            help="Command that starts the receiver: the kit starts it, kills it and starts it again."
        ),
    ] = "",
    listen: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="Port on loopback at which the receiver's callbacks are awaited, as if Flyball were there.",
            show_default="",
        ),
    ] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this check; may be repeated.", show_default="all")
    ] = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds that an operation may take to end.")] = 30.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="What was sent and what came, also of checks that passed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tries whether a hook keeps the contract: signatures, duplicates, order, lost answers, crashes, cancel, undo.

    Each order is really carried out on the target, some of them several times, and undone. Exit code 1 when a check failed,
    3 when nothing answers.

    Examples:

      flyball hook conform https://hooks.example.com/nodes --action drain --target test-node-1

      flyball hook conform http://127.0.0.1:9922/ --action drain --target node-1 --command "python hook_receiver.py 9922 hook-data node-1" --json
    """
    from pydantic import SecretStr, TypeAdapter, ValidationError

    from flyball.remediation.hooks.conformance import run
    from flyball.remediation.hooks.kit import HookNotReached, Trial
    from flyball.remediation.http_guard import HttpUrl
    from flyball.remediation.signing import SigningSecret

    if not secret:
        raise ConfigError("there is no secret to sign with; set HOOK_SECRET, or give --secret")
    try:
        key: SecretStr = TypeAdapter(SigningSecret).validate_python(secret)
    except ValidationError as e:
        raise ConfigError(str(e.errors()[0]["msg"]).removeprefix("Value error, "), where="--secret") from None
    try:
        TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as e:
        raise ConfigError(str(e.errors()[0]["msg"]).removeprefix("Value error, "), where=url) from None
    with _listening(listen) as heard, _receiver(command, url) as restart:
        trial = Trial(
            url=url,
            secret=key,
            action=action,
            targets=tuple(target),
            params=_params(params),
            restart=restart,
            heard=heard,
            wait_s=wait,
        )
        try:
            checks = run(trial, only or (), lambda check: None if as_json else _print(check, verbose))
        except HookNotReached as e:
            raise Unreachable(str(e)) from e
    if as_json:
        for check in checks:
            print_json(check)
    else:
        count = {r: sum(c.result == r for c in checks) for r in ("passed", "failed", "not_run")}
        print(f"{count['passed']} passed, {count['failed']} failed, {count['not_run']} not run")
    if any(c.result == "failed" for c in checks):
        raise typer.Exit(1)


def _params(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise ConfigError(f'is no JSON ({e}); write for example {{"grace_s": 30}}', where="--params") from e
    if not isinstance(found, dict):
        raise ConfigError('is no JSON object; write for example {"grace_s": 30}', where="--params")
    return found


def _print(check: Check, verbose: bool) -> None:
    print(f"{check.result.replace('_', ' '):8} {check.name}: {check.asks}")
    if check.result == "not_run":
        print(f"           {check.why}")
    if check.result == "failed" or verbose:
        for e in check.exchanges:
            print(f"         {'  ' if e.ok else '! '}sent: {e.sent}; expected: {e.expected}; came: {e.came}")
    sys.stdout.flush()


@contextmanager
def _listening(port: int) -> Iterator[Callable[[], list[Callback]] | None]:
    """What is posted to this port; nothing where none is given."""
    if not port:
        yield None
        return
    posted: list[Callback] = []

    class Listener(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else 0
            body = self.rfile.read(min(size, _CALLBACK_BYTES))
            posted.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the check says what came."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Listener)
    except OSError as e:
        raise ConfigError(
            f"port {port} cannot be listened on ({e.strerror}); take another", where="--listen"
        ) from e
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield lambda: list(posted)
        finally:
            server.shutdown()


@contextmanager
def _receiver(command: str, url: str) -> Iterator[Callable[[], None] | None]:
    """The receiver while the kit runs, and how to kill and start it again; nothing where there is no command."""
    words = shlex.split(command)
    if not words:
        yield None
        return
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    if _answers(address):
        raise ConfigError(f"something answers at {url} already; stop it, so that --command can start it")
    running = [_started(words, address)]

    def restart() -> None:
        _kill(running[0])
        running[0] = _started(words, address)

    try:
        yield restart
    finally:
        _kill(running[0])


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _started(words: list[str], address: tuple[str, int]) -> subprocess.Popen[bytes]:
    try:
        # A group of its own, so that a kill reaches what a wrapper such as `uv run` starts as well. What it prints is no answer of ours.
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    except OSError as e:
        raise ConfigError(f"cannot be started: {e}; give the command as in a shell", where="--command") from e
    end = time.monotonic() + _UP_WITHIN_S
    while not _answers(address):
        if process.poll() is not None:
            raise Unreachable(f"{words[0]} ended with {process.returncode} before it answered")
        if time.monotonic() > end:
            _kill(process)
            raise Unreachable(f"{words[0]} does not answer at {address[0]}:{address[1]}")
        time.sleep(0.05)
    return process


def _answers(address: tuple[str, int]) -> bool:
    with suppress(OSError), socket.create_connection(address, timeout=1.0):
        return True
    return False
