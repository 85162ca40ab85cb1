"""What the commands share: options, JSON output, errors of reaching a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
import typer

from flyball.core.errors import ConfigError, FlyballError

if TYPE_CHECKING:
    from sqlalchemy import Connection

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
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Read this data folder instead of asking a running Flyball.", show_default=""
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


def get(url: str, token: str, path: str, **params: Any) -> Any:
    with client(url, token) as c:
        response = c.get(path, params=params)
        response.raise_for_status()
        return response.json()


def post(url: str, token: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a running Flyball says to a person's word; 202 means that it is taken and its consequences follow."""
    with client(url, token) as c:
        response = c.post(path, json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def database(data: Path | str) -> Iterator[Connection]:
    """The database of a data folder or at an address, to be read, also beside a running Flyball."""
    from flyball.app.store.database import reading
    from flyball.app.wiring import database_path

    where = database_path(data) if isinstance(data, Path) else data
    if isinstance(where, Path) and not where.exists():
        raise ConfigError(
            "holds no Flyball database; name the folder that `flyball run --data` uses", where=str(data)
        )
    with reading(where) as c:
        yield c


def _detail(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:200]
    return str(body.get("detail") or body.get("error") or body) if isinstance(body, dict) else str(body)


def plain_terminal() -> bool:
    """True where colours and bars are not wanted."""
    return "NO_COLOR" in os.environ or not sys.stderr.isatty()
