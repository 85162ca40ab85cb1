"""Which remediation hooks there are, and the secrets they share with us."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flyball.core.errors import ConfigError
from flyball.remediation.http_guard import Allowed, HttpUrl, Resolver, check_url, guarded_client
from flyball.remediation.signing import SigningSecret


class HookSettings(BaseModel):
    """One remediation hook: a service of a platform team that does what no lease can do."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="What runbooks call it in `hook: {name: …}`."
    )
    url: HttpUrl = Field(
        description="Where requests are posted; their status is asked below it, at `/operations/ID`."
    )
    secrets: list[SigningSecret] = Field(
        min_length=1,
        max_length=4,
        description="`whsec_` and 24 to 64 bytes in base64; requests are signed with each, callbacks with any of them.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=60,
        description="Seconds for one answer, all in all; after it the answer counts as lost.",
    )
    allow_private: bool = Field(
        False, description="The address may be private or loopback; otherwise only public ones are reached."
    )

    @model_validator(mode="after")
    def _may_be_reached(self) -> HookSettings:
        parts = urlsplit(self.url)
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError("the address of a hook has no `?`, no `#` and no user; write https://host/path")
        try:
            httpx.URL(self.url)
            check_url(self.url, allowed_of([self]))
        except httpx.InvalidURL as e:
            raise ValueError(f"is no address ({e}); write https://host/path") from e
        except ConfigError as e:
            # The text of the guard names settings of notifiers.
            raise ValueError(
                f"{parts.hostname} is not a public address; write `allow_private: true` if it is meant"
            ) from e
        return self

    @property
    def status_url(self) -> str:
        return self.url.rstrip("/") + "/operations/"


def allowed_of(hooks: Iterable[HookSettings]) -> Allowed:
    """What may be reached for these hooks beside the public internet. Link-local addresses never."""
    return Allowed.of(hosts=[urlsplit(h.url).hostname or "" for h in hooks if h.allow_private])


def hooks_client(hooks: Iterable[HookSettings], resolver: Resolver | None = None) -> httpx.AsyncClient:
    """The guarded HTTP client for `HookClient`; to be closed by the caller."""
    return guarded_client(allowed_of(hooks), resolver=resolver)
