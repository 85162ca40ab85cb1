"""Provider errors → canonical classes, through the matchers of `errors.yaml`.

The message is read here, at the edge, to classify; it goes no further.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any, Final

import yaml

from flyball.core.errorclass import CLASS_INDEX, ErrorClass
from flyball.core.errors import ConfigError, did_you_mean

_FIELDS: Final = ("provider", "status", "code", "type", "normalized", "message")
_STATUS_IN_TEXT: Final = re.compile(
    r"(?:error code|status[ _]code|http(?: status)?)\s*[:=]?\s*\(?([45]\d\d)\b"
)
_VARIES: Final = re.compile(r"\b\w*\d[\w-]*")
"""Request ids and figures: the same sentence with other ones is of the same class, and found in the cache."""
_NOT_ALNUM: Final = re.compile(r"[^a-z0-9]+")
_MESSAGE_LIMIT: Final = 4000
_CACHE_LIMIT: Final = 8192


class _Rule:
    """One entry of the file: every field that it names must match; a list matches by any of its members."""

    __slots__ = ("code", "klass", "message", "normalized", "provider", "status", "type")

    def __init__(self, entry: dict[str, Any], where: str) -> None:
        unknown = set(entry) - {*_FIELDS, "class"}
        if unknown:
            word = sorted(unknown)[0]
            raise ConfigError(f"unknown field {word!r}{did_you_mean(word, _FIELDS)}", where=where)
        self.klass = str(entry.get("class", ""))
        if self.klass not in CLASS_INDEX or not self.klass:
            raise ConfigError(
                f"unknown class {self.klass!r}{did_you_mean(self.klass, [c.value for c in ErrorClass])}",
                where=where,
            )
        if not any(entry.get(name) for name in _FIELDS):
            raise ConfigError("a matcher without any field would match everything", where=where)
        self.status = _statuses(entry.get("status", []))
        self.provider = frozenset(str(x) for x in entry.get("provider", []))
        self.code = frozenset(_word(str(x)) for x in entry.get("code", []))
        self.type = tuple(_word(str(x)) for x in entry.get("type", []))
        self.normalized = frozenset(str(x) for x in entry.get("normalized", []))
        patterns = [str(x) for x in entry.get("message", [])]
        try:
            self.message = re.compile("|".join(patterns)) if patterns else None
        except re.error as e:
            raise ConfigError(f"not a regular expression: {e}", where=where) from e

    def matches(
        self, provider: str, status: int, code: str, type_: str, normalized: str, message: str
    ) -> bool:
        return (
            (not self.provider or provider in self.provider)
            and (not self.status or status in self.status)
            and (not self.code or code in self.code)
            and (not self.type or (type_ != "" and type_.endswith(self.type)))
            and (not self.normalized or normalized in self.normalized)
            and (self.message is None or self.message.search(message) is not None)
        )


def _statuses(entries: list[Any]) -> frozenset[int]:
    """Numbers, or spans such as `500-599`."""
    found: set[int] = set()
    for entry in entries:
        low, _, high = str(entry).partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def _word(text: str) -> str:
    """`openai.RateLimitError`, `rate_limit_error` and `RateLimitError` are one word."""
    return _NOT_ALNUM.sub("", text.rpartition(".")[2].lower())


class Classifier:
    """Says which canonical class an error is of; the first matcher of the file that fits wins.

    Misleads when a source says neither status nor code nor text (Anthropic's own spans hide quota and context length
    behind `rate_limit_error` and `invalid_request_error`): then the class is that of the type alone.

    Args:
        text: YAML as in `errors.yaml`; None reads the packaged file.

    Raises: ConfigError for a file with unknown fields, classes or a broken regular expression.

    >>> Classifier().classify(status=429, message="You exceeded your current quota, please check your plan")
    'quota_exhausted'
    """

    def __init__(self, text: str | None = None) -> None:
        if text is None:
            text = files("flyball.streams").joinpath("errors.yaml").read_text("utf-8")
        try:
            entries = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"not YAML: {e}", where="errors.yaml") from e
        if not isinstance(entries, list):
            raise ConfigError("must be a list of matchers", where="errors.yaml")
        self._rules = [_Rule(e, f"errors.yaml: matcher {i + 1}") for i, e in enumerate(entries)]
        self._seen: dict[tuple[str, int, str, str, str, str], str] = {}

    def classify(
        self,
        *,
        provider: str = "",
        status: int | str | None = None,
        code: str = "",
        type: str = "",
        message: str = "",
        normalized: str = "",
    ) -> str:
        """The class of one failed call; `unknown` when nothing fits.

        Args:
            provider: who served it, by our short names (`openai`, `bedrock`, …).
            status: HTTP status; found in `message` ("Error code: 429 - …") when missing.
            code: the provider's word (`insufficient_quota`); a number here is taken as the status.
            type: exception or error type in any spelling.
            message: the provider's sentence; only its first 4,000 characters are read.
            normalized: LiteLLM's `normalized_error`.
        """
        message = message[:_MESSAGE_LIMIT].lower()
        number = _number(status) or _number(code) or _number(type)
        if not number and (in_text := _STATUS_IN_TEXT.search(message)):
            number = int(in_text[1])
        key = (provider, number, code, type, _VARIES.sub("0", message), normalized)
        found = self._seen.get(key)
        if found is None:
            found = self._decide(*key)
            if len(self._seen) >= _CACHE_LIMIT:
                self._seen.clear()
            self._seen[key] = found
        return found

    def _decide(
        self, provider: str, status: int, code: str, type_: str, message: str, normalized: str
    ) -> str:
        code = "" if code.isdigit() else _word(code)
        type_ = "" if type_.isdigit() else _word(type_)
        for rule in self._rules:
            if rule.matches(provider, status, code, type_, normalized, message):
                return rule.klass
        return ErrorClass.UNKNOWN.value


def _number(value: int | str | None) -> int:
    """An HTTP status of failure, else 0: a failed call under status 200 broke later, and 200 says nothing of it."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) == 3 else 0
    return value if value is not None and 400 <= value <= 599 else 0
