"""The canonical classes of failed LLM calls, and what each means for blame.

A class says who has to act: `overloaded` is the provider's, `auth` the credential's, `context_too_long` the application's,
`gateway_local` nobody's (a consequence of our own or the gateway's block). Taking one for another makes the
remediation wrong, above all `quota_exhausted` (never wait) for `rate_limited` (wait).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class ErrorClass(StrEnum):
    RATE_LIMITED = "rate_limited"
    QUOTA_EXHAUSTED = "quota_exhausted"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    AUTH = "auth"
    NOT_FOUND = "not_found"
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_FILTER = "content_filter"
    BAD_REQUEST = "bad_request"
    STREAM_INTERRUPTED = "stream_interrupted"
    CANCELLED = "cancelled"
    GATEWAY_LOCAL = "gateway_local"
    UNKNOWN = "unknown"


OK: Final = ""
"""The class of a call that did not fail: the empty string, so that `if call.error:` reads as meant."""

CLASSES: Final[tuple[str, ...]] = (OK, *(c.value for c in ErrorClass))
"""Column order of every `by_class` array; column 0 is success. Append only: snapshots rely on the order."""

CLASS_INDEX: Final[dict[str, int]] = {c: i for i, c in enumerate(CLASSES)}

PROVIDER_HEALTH: Final[frozenset[str]] = frozenset(
    {"overloaded", "server_error", "connection", "timeout", "stream_interrupted"}
)
"""Classes that count against a provider's health."""

NOT_ATTEMPTS: Final[frozenset[str]] = frozenset({"gateway_local", "cancelled"})
"""Calls that never tested the provider: neither in the numerator nor in the denominator of its error ratio."""

SCOPE_OF: Final[dict[str, str]] = {
    "rate_limited": "key",
    "quota_exhausted": "account",
    "overloaded": "provider",
    "server_error": "provider",
    "connection": "provider",
    "timeout": "model",
    "auth": "credential",
    "not_found": "model",
    "context_too_long": "app",
    "content_filter": "app",
    "bad_request": "app",
    "stream_interrupted": "provider",
    "cancelled": "client",
    "gateway_local": "gateway",
    "unknown": "unknown",
}
"""Where the fault usually lies; the root ranking starts from it and may find otherwise."""
