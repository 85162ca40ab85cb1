"""One request to a hook, and an exact word for what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from flyball.core.directives import Operation, OperationReport
from flyball.core.errors import DecodeError, NotAccepted
from flyball.core.ports import Clock
from flyball.remediation.hooks._settings import HookSettings
from flyball.remediation.hooks.wire import (
    ANSWER_BYTES,
    REQUEST_BYTES,
    decode_answer,
    message_id,
    report_of,
    request_body,
    told,
    unknown,
)
from flyball.remediation.http_guard import AddressRefused
from flyball.remediation.notifiers._base import retry_after_s
from flyball.remediation.signing import signed_headers


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: httpx.Headers
    body: bytes


class _Lost(Exception):
    """No whole answer. `sent`: whether anything of the request may have arrived."""

    def __init__(self, sent: bool, code: str, detail: str) -> None:
        self.sent, self.code, self.detail = sent, code, detail
        super().__init__(detail)


class HookClient:
    """Sends operations to the hooks of the settings, signed.

    Never tries twice by itself: whether a second try is allowed is the caller's business.

    Args:
        client: `hooks_client(hooks)` in production. clock: wall time, for the signatures.
    """

    def __init__(self, hooks: Sequence[HookSettings], client: httpx.AsyncClient, clock: Clock) -> None:
        self._hooks = {h.name: h for h in hooks}
        self._client, self._clock = client, clock

    async def send(self, operation: Operation) -> OperationReport:
        """Posts the request; says what the hook answered, or how far it got.

        `not_reached`: certainly nothing was sent. `ambiguous`: it may have been taken; ask, do not send again.
        """
        hook = self._hooks.get(operation.hook)
        if hook is None:
            return self._no_hook(operation)
        text = request_body(operation)
        body = text.encode()
        if len(body) > REQUEST_BYTES:
            detail = f"the request has {len(body)} bytes, {REQUEST_BYTES} are allowed; nothing was sent"
            return told(operation, self._clock.now(), "rejected", "too_large", detail)
        now = self._clock.now()
        headers = signed_headers(hook.secrets, message_id(operation), text, now)
        try:
            reply = await self._exchange(hook, "POST", hook.url, headers, body)
        except _Lost as e:
            now = self._clock.now()
            return told(operation, now, "ambiguous" if e.sent else "not_reached", e.code, e.detail)
        except AddressRefused as e:
            return told(operation, self._clock.now(), "rejected", "address_refused", str(e))
        return _judge(operation, reply, self._clock.now())

    async def ask(self, operation: Operation) -> OperationReport:
        """Asks for the status of an operation. Changes nothing, so it may be repeated.

        `not_reached`: no answer this time, whatever the reason. `ambiguous` with code `not_known`: the hook has never heard of it.
        """
        hook = self._hooks.get(operation.hook)
        if hook is None:
            return self._no_hook(operation)
        now = self._clock.now()
        headers = signed_headers(hook.secrets, f"{operation.id}.status.{int(now * 1000)}", "", now)
        url = f"{hook.status_url}{operation.id}?verb={operation.verb}"
        try:
            reply = await self._exchange(hook, "GET", url, headers, None)
        except (_Lost, AddressRefused) as e:
            return told(operation, self._clock.now(), "not_reached", "no_status", str(e))
        now = self._clock.now()
        if reply.status == 404:
            return unknown(operation, now, "not_known", "the hook does not know this operation")
        if reply.status != 200:
            return told(operation, now, "not_reached", f"http_{reply.status}", "asked for the status")
        try:
            return report_of(decode_answer(reply.body), operation, now)
        except DecodeError as e:
            return told(operation, now, "not_reached", e.reason, e.detail)

    def _no_hook(self, operation: Operation) -> OperationReport:
        detail = f"no hook is called {operation.hook!r} in the settings; nothing was sent"
        return told(operation, self._clock.now(), "rejected", "no_hook", detail)

    async def _exchange(
        self, hook: HookSettings, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> _Reply:
        """Raises: _Lost without a whole answer; AddressRefused."""
        progress = _Progress()
        try:
            async with asyncio.timeout(hook.timeout_s):
                return await self._read(hook, method, url, headers, body, progress)
        except TimeoutError as e:
            raise _Lost(progress.sent, "timeout", f"no answer within {hook.timeout_s:g} s") from e
        except NotAccepted as e:
            raise _Lost(False, "no_address", str(e)) from e
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as e:
            raise _Lost(
                False, "not_connected", f"not connected ({type(e).__name__}); nothing was sent"
            ) from e
        except httpx.TransportError as e:
            raise _Lost(True, "no_answer", f"sent, no whole answer ({type(e).__name__})") from e

    async def _read(
        self, hook: HookSettings, method: str, url: str, headers: dict[str, str], body: bytes | None,
        progress: Callable[..., Any],
    ) -> _Reply:  # fmt: skip
        fixed = {
            "accept": "application/json",
            # Read as it comes: a bounded answer must not grow when it is unpacked.
            "accept-encoding": "identity",
            "user-agent": "flyball",
            **({"content-type": "application/json"} if body is not None else {}),
        }
        timeout = httpx.Timeout(hook.timeout_s, connect=min(5.0, hook.timeout_s))
        async with self._client.stream(
            method, url, content=body, headers={**fixed, **headers}, timeout=timeout, follow_redirects=False,
            extensions={"trace": progress},
        ) as response:  # fmt: skip
            answer = b""
            async for part in response.aiter_raw():
                answer += part[: ANSWER_BYTES + 1 - len(answer)]
                if len(answer) > ANSWER_BYTES:
                    break
            return _Reply(response.status_code, response.headers, answer)


class _Progress:
    """Told by the transport what it is about to do: tells a time-out while connecting from one after sending."""

    def __init__(self) -> None:
        self.sent = False

    async def __call__(self, event: str, info: Any) -> None:
        if not event.startswith("connection."):
            self.sent = True


def _judge(operation: Operation, reply: _Reply, at: float) -> OperationReport:
    status = reply.status
    wait = retry_after_s(reply.headers.get("retry-after", ""), at)
    if 200 <= status < 300:
        try:
            answer = decode_answer(reply.body)
        except DecodeError as e:
            return unknown(operation, at, e.reason, e.detail)
        report = _with_wait(report_of(answer, operation, at), wait)
        return _judge_dry_run(operation, report) if operation.dry_run else report
    code = f"http_{status}"
    if status in (425, 429) or (status == 503 and wait is not None):
        return told(operation, at, "rejected", code, "asked to wait", transient=True, retry_after_s=wait)
    # 408 means that the request did not arrive whole; but there are proxies that say it of the service behind them.
    if status >= 500 or status == 408:
        return unknown(operation, at, code, "may have been taken")
    if 300 <= status < 400:
        return told(
            operation, at, "rejected", code, "a redirect; they are not followed: set the final address"
        )
    return _with_wait(_judge_refusal(operation, reply, code, at), wait)


def _with_wait(report: OperationReport, wait: float | None) -> OperationReport:
    return msgspec.structs.replace(report, retry_after_s=wait) if report.transient else report


def _judge_refusal(operation: Operation, reply: _Reply, code: str, at: float) -> OperationReport:
    """A 4xx: a refusal, with the hook's own reason where it gives one."""
    try:
        report = report_of(decode_answer(reply.body), operation, at)
    except DecodeError:
        return told(operation, at, "rejected", code)
    if report.status in ("rejected", "unsupported"):
        return report
    return unknown(operation, at, code, f"a refusal that says {report.status}")


def _judge_dry_run(operation: Operation, report: OperationReport) -> OperationReport:
    """A dry run has to say what would be done. One that does not is as good as a no."""
    at = report.at
    if report.status in ("rejected", "unsupported"):
        return report
    if report.status != "accepted":
        return told(operation, at, "rejected", "dry_run_status", f"answered {report.status}; right: accepted")
    if not report.targets or not report.predicted:
        return told(operation, at, "rejected", "dry_run_incomplete", "targets or predicted is missing")
    if beyond := sorted(set(report.targets) - set(operation.targets)):
        return told(operation, at, "rejected", "targets_differ", f"would touch {beyond[0][:80]} as well")
    return report
