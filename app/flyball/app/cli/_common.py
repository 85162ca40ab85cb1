"""What the commands share: options, JSON output, errors of reaching a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer

from flyball.core.errors import FlyballError

DEFAULT_URL = "http://127.0.0.1:4390"

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (YAML).")]
Runbooks = Annotated[
    list[Path] | None, typer.Option("--runbooks", help="Folder or file with runbooks; may be repeated.")
]
Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="FLYBALL_URL", help="Address of a running Flyball.", show_default=DEFAULT_URL
    ),
]
TokenOption = Annotated[
    str, typer.Option("--token", envvar="FLYBALL_TOKEN", help="Bearer token, where one is needed.")
]


class Unreachable(FlyballError):
    """Something that should answer does not: exit code 3."""


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


@contextmanager
def client(url: str, token: str) -> Iterator[httpx.Client]:
    """An HTTP client of a running Flyball whose errors read well."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=10.0) as c:
            yield c
    except httpx.InvalidURL as e:
        raise FlyballError(f"{url!r} is not an address ({e}); write for example {DEFAULT_URL}") from e
    except httpx.TransportError as e:
        raise Unreachable(
            f"no answer from {url} ({type(e).__name__}); start one with `flyball run`, or name it with --url"
        ) from e
    except httpx.HTTPStatusError as e:
        detail = _detail(e.response)
        if e.response.status_code in (401, 403):
            raise FlyballError(
                f"{url} says {e.response.status_code}: {detail}; give a token with --token"
            ) from e
        raise FlyballError(f"{url} says {e.response.status_code}: {detail}") from e


def _detail(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:200]
    return str(body.get("detail") or body.get("error") or body) if isinstance(body, dict) else str(body)


def plain_terminal() -> bool:
    """True where colours and bars are not wanted."""
    return "NO_COLOR" in os.environ or not sys.stderr.isatty()
