"""What every notifier shares: the delivery it gets, the receipt it gives, and one place where HTTP becomes our errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Literal, Protocol

import httpx
import msgspec

from flyball.core.errors import Ambiguous, Failed, NotAccepted
from flyball.core.incident import Incident, IncidentChange
from flyball.remediation.render import Message

ANSWER_BYTES = 64 * 1024
"""Most of an answer that is read; nobody needs more to say yes."""
RETRY_AFTER_MOST_S = 3600.0


class Gone(Failed):
    """The other side says that the address is gone for good (410): trying again is unwelcome."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a delivery; kept by the outbox and given back with the next one for the same incident and channel.

    status: `sent`; `superseded` when a newer revision was sent in its place; `skipped` when there was nothing to say.
    ref: what the channel needs to find the message again (Slack: `channel:ts`), or the id the other side gave.
    repeat_at: when to send the same again; None for never.
    """

    status: Literal["sent", "superseded", "skipped"] = "sent"
    ref: str = ""
    at: float = 0.0
    revision: int = 0
    state: str = ""
    severity: int = 0
    repeat_at: float | None = None

    def to_text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_text(cls, text: str) -> Receipt | None:
        """The inverse of `to_text`; None for the empty text or one that is not a receipt: then it counts as first."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message on its way to one channel.

    id: the same for every try, so that the other side can tell copies.
    notify: whether people are to hear of it, or a message already there is only brought up to date.
    previous: receipt of what was last sent of this incident on this channel; None for the first.
    now: wall time of this try.
    """

    id: str
    message: Message
    change: IncidentChange
    now: float
    notify: bool = True
    previous: Receipt | None = None

    @property
    def incident(self) -> Incident:
        return self.change.incident

    def receipt(self, ref: str = "", repeat_at: float | None = None) -> Receipt:
        """The receipt of this delivery as sent."""
        i = self.incident
        return Receipt(
            ref=ref,
            at=self.now,
            revision=i.revision,
            state=i.state.value,
            severity=int(i.severity),
            repeat_at=repeat_at,
        )


class Notifier(Protocol):
    """One way to reach people. Stateless: what must be remembered stands in the receipt.

    kind: the file's name and the word in the settings.
    wakes: whether it may wake a person; then it gets only incidents with `page`.

    Beside what stands here, the class has a nested pydantic model `Params`, what a person can set (extra fields forbidden, secrets as
    SecretStr), and is made with one: `Kind(params)`. The registry's test checks it.
    """

    kind: ClassVar[str]
    wakes: ClassVar[bool]

    @classmethod
    def edits(cls, params: Any) -> bool:
        """Whether it can bring a message it sent up to date in place, so that changes nobody needs to hear of go to it too."""
        ...

    @property
    def buttons(self) -> bool:
        """Whether buttons in its messages can be pressed."""
        ...

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        """Sends. Raises: NotAccepted, Failed or Ambiguous."""
        ...


def iso(at: float) -> str:
    """RFC 3339 in UTC, milliseconds. Times out of range become the nearest that can be written."""
    at = min(max(at, 0.0), 253402300799.0) if at == at else 0.0
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dumps(body: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def finite(value: float) -> float:
    """JSON has no NaN and no infinity; they count as 0."""
    return value if value == value and abs(value) != float("inf") else 0.0


def retry_after_s(value: str, now: float) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None when it says nothing we understand.

    >>> retry_after_s("30", 0.0), retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 0.0), retry_after_s("soon", 0.0)
    (30.0, 60.0, None)
    """
    value = value.strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return min(float(value), RETRY_AFTER_MOST_S)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return min(max(when.timestamp() - now, 0.0), RETRY_AFTER_MOST_S)


async def post(
    client: httpx.AsyncClient,
    url: str,
    body: bytes,
    *,
    now: float,
    what: str,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Posts JSON and reads a bounded answer. `what` names the other side in errors; addresses never stand there, they can be secrets.

    Raises: NotAccepted when nothing was taken (not reached, 408, 425, 429); Ambiguous when it may have been (no answer, 5xx);
    Gone on 410; Failed on every other answer that is not 2xx, redirects included: they are not followed.
    """
    all_headers = {"content-type": "application/json", "user-agent": "flyball", **(headers or {})}
    answer = b""
    try:
        async with client.stream(
            "POST", url, content=body, headers=all_headers, follow_redirects=False
        ) as response:
            async for part in response.aiter_raw():
                answer += part[: ANSWER_BYTES - len(answer)]
                if len(answer) >= ANSWER_BYTES:
                    break
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as e:
        raise NotAccepted(f"{what} not reached ({type(e).__name__}); nothing was sent") from e
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
        raise Failed(f"the address of {what} is no http or https address") from e
    except httpx.TransportError as e:
        raise Ambiguous(f"sent to {what}, no answer ({type(e).__name__})") from e
    status = response.status_code
    if 200 <= status < 300:
        return answer
    said = _short(answer)
    if status in (408, 425, 429):
        wait = retry_after_s(response.headers.get("retry-after", ""), now)
        raise NotAccepted(f"{what} answered {status}{said}", retry_after_s=wait)
    if status == 503 and (wait := retry_after_s(response.headers.get("retry-after", ""), now)) is not None:
        raise NotAccepted(f"{what} answered 503{said}", retry_after_s=wait)
    if status >= 500:
        raise Ambiguous(f"{what} answered {status}{said}")
    if status == 410:
        raise Gone(f"{what} answered 410: the address is gone")
    if 300 <= status < 400:
        raise Failed(
            f"{what} answered {status}, a redirect; redirects are not followed: set the final address"
        )
    raise Failed(f"{what} answered {status}{said}")


def _short(answer: bytes) -> str:
    text = "".join(c if c.isprintable() else " " for c in answer[:200].decode("utf-8", "replace")).strip()
    return f": {text}" if text else ""
