"""Who may do what: bearer tokens with roles; on loopback without tokens, everyone on this machine may do everything."""

from __future__ import annotations

import hmac
from typing import Final

from fastapi import HTTPException, Request

from flyball.app.settings import Token

_LOOPBACK_HOSTS: Final = {"127.0.0.1", "localhost", "[::1]", "::1", "testserver"}


class Auth:
    """Checks requests against the tokens of the settings.

    Args:
        tokens: none means loopback without tokens. Then the Host header must be a loopback name, so that a web page
            that rebinds its DNS name to this machine cannot reach us through a browser.
    """

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens

    def check(self, request: Request, role: str) -> str:
        """The name of who asks. Raises: HTTPException 401 without a known token, 403 when the token lacks the role."""
        if not self._tokens:
            host = (
                request.headers.get("host", "").rsplit(":", 1)[0]
                if request.headers.get("host")
                else "127.0.0.1"
            )
            if host not in _LOOPBACK_HOSTS:
                raise HTTPException(
                    403, f"Host {host!r} is not loopback; set `tokens` to be reached under other names"
                )
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
