"""Who may do what: bearer tokens with roles; on loopback without tokens, everyone on this machine may do everything."""

from __future__ import annotations

import hmac
from typing import Final
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from flyball.app.settings import Token

_LOOPBACK_HOSTS: Final = {"127.0.0.1", "localhost", "::1"}


class Auth:
    """Checks requests against the tokens of the settings.

    Args:
        tokens: none means loopback without tokens. Then Host and Origin must be loopback names, so that a web page can reach us
            through a browser neither by rebinding its DNS name to this machine nor by posting across origins.
    """

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens

    def check(self, request: Request, role: str) -> str:
        """The name of who asks. Raises: HTTPException 401 without a known token, 403 when the token lacks the role."""
        if not self._tokens:
            self._check_local(request)
            return "local"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise HTTPException(
                401, "needs `Authorization: Bearer TOKEN`", headers={"WWW-Authenticate": "Bearer"}
            )
        found = None
        for token in self._tokens:  # every one is compared, so that time tells nothing
            if hmac.compare_digest(token.token.get_secret_value().encode(), given.strip().encode()):
                found = token
        if found is None:
            raise HTTPException(401, "unknown token", headers={"WWW-Authenticate": "Bearer"})
        if role not in found.roles and "admin" not in found.roles:
            raise HTTPException(
                403, f"token {found.name!r} has no role {role!r}; it has {', '.join(sorted(found.roles))}"
            )
        return found.name

    def _check_local(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if host and _name(f"//{host}") not in _LOOPBACK_HOSTS:
            raise HTTPException(
                403, f"Host {host[:200]!r} is not loopback; set `tokens` to be reached under other names"
            )
        origin = request.headers.get("origin", "")
        if origin and _name(origin) not in _LOOPBACK_HOSTS:
            raise HTTPException(
                403, f"Origin {origin[:200]!r} is another site's; set `tokens` to be used from there"
            )


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
