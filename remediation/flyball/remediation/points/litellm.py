"""The LiteLLM proxy as an enforcement point. In its config.yaml:

    litellm_settings:
      callbacks: ["generic_api", "flyball.remediation.points.litellm.guard"]

and in its environment `FLYBALL_URL` (and `FLYBALL_TOKEN`, where Flyball asks for one). It redirects, limits, caps and blocks as the
live directives want it, from a set that threads of its own keep current: no call ever waits for Flyball, and with Flyball gone every
directive ends at its own expiry.

Further variables, all optional:

- `FLYBALL_POINT_NAME`: how this proxy names itself in reports.
- `FLYBALL_POINT_KEEP`: file that the set is kept in over restarts.
- `FLYBALL_POINT_LIMIT_SHARE`: part of every limit that one process of the proxy lets through, e.g. `0.25` with four workers.
- `FLYBALL_POINT_GROUPS`: JSON, model group → groups that may stand in for it, best first; before the router's own fallbacks.
- `FLYBALL_POINT_LABELS`: JSON, as `labels.litellm` in flyball.yaml, where that is set.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import litellm  # type: ignore[import-not-found]
from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger  # type: ignore[import-not-found]

from flyball.remediation.points._litellm_calls import LABELS, Groups
from flyball.remediation.points._litellm_guard import Obeyer
from flyball.remediation.points.client import PointClient

DEFAULT_URL: Final = "http://127.0.0.1:4390"
_log = logging.getLogger("flyball.point")


T = TypeVar("T")


class Guard(CustomLogger):  # type: ignore[misc]  # LiteLLM is no dependency of ours: it is there where this runs
    """What the proxy calls. One per process; after a fork it starts anew, because threads do not survive one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__()
        self._environ = environ
        self._alternates = _lists("FLYBALL_POINT_GROUPS", environ)
        self._rules = _lists("FLYBALL_POINT_LABELS", environ)
        unknown = sorted(set(self._rules) - set(LABELS))
        if unknown:
            raise ValueError(
                f"FLYBALL_POINT_LABELS: unknown label {unknown[0]!r}; known: {', '.join(LABELS)}"
            )
        self._share = _share("FLYBALL_POINT_LIMIT_SHARE", environ)
        self._lock = threading.Lock()
        self._groups: tuple[int, Groups] | None = None
        self._faults: set[str] = set()
        self._pid = -1
        self._obeyer = self._started()

    def _started(self) -> Obeyer:
        pid = os.getpid()
        client = PointClient(
            self._environ.get("FLYBALL_URL") or DEFAULT_URL,
            token=self._environ.get("FLYBALL_TOKEN", ""),
            point=self._environ.get("FLYBALL_POINT_NAME") or f"litellm-{socket.gethostname()}-{pid}",
            keep=Path(keep) if (keep := self._environ.get("FLYBALL_POINT_KEEP")) else None,
            limit_share=self._share,
        )
        client.start()
        self._pid = pid
        return Obeyer(client, self._current_groups, self._rules)

    def _here(self) -> Obeyer:
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self._obeyer = self._started()
        return self._obeyer

    def _current_groups(self) -> Groups:
        """Made anew when the proxy's list of models changed."""
        # Bound anew when the proxy reads its config, so looked up each time.
        from litellm.proxy.proxy_server import llm_router  # type: ignore[import-not-found]

        models = getattr(llm_router, "model_list", None) or []
        fallbacks = getattr(llm_router, "fallbacks", None) or []
        key = hash((tuple(map(id, models)), len(fallbacks)))
        if self._groups is None or self._groups[0] != key:
            aliases = getattr(llm_router, "model_group_alias", None) or {}
            made = Groups(
                models, _provider_of, alternates=self._alternates, fallbacks=fallbacks, aliases=aliases
            )
            self._groups = (key, made)
        return self._groups[1]

    def _guarded(self, what: Callable[[], T], otherwise: T) -> T:
        """A request of a shape that nobody foresaw goes on untouched: a guard must not be what breaks calls."""
        try:
            return what()
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            fault = type(e).__name__
            if fault not in self._faults:  # told once, not for every call
                self._faults.add(fault)
                _log.exception("point.not_understood")
            return otherwise

    # --- what the proxy calls -------------------------------------------------------------------------------------

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        refusal = self._guarded(lambda: self._here().obey(data, call_type), None)
        if refusal is not None:
            headers = (
                {"retry-after": f"{refusal.retry_after_s:.0f}"} if refusal.retry_after_s >= 0.5 else None
            )
            raise HTTPException(refusal.status, detail=refusal.text, headers=headers)
        return data

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: Any,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        call_id = str((request_kwargs or {}).get("litellm_call_id") or "")
        return self._guarded(lambda: self._here().among(call_id, healthy_deployments), healthy_deployments)

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        told = kwargs.get("standard_logging_object") or {}
        free = told.get("cache_hit") is True
        # A stream without usage tells of no tokens, which is not the same as none.
        tokens = 0 if free else told.get("total_tokens") or None
        usd = 0.0 if free else told.get("response_cost")
        self._here().charge(str(kwargs.get("litellm_call_id") or ""), tokens, usd)

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """Once for a call that failed in the end, whatever fallbacks were tried before."""
        self._here().charge(str(request_data.get("litellm_call_id") or ""), 0, 0.0)


def _provider_of(params: Mapping[str, Any]) -> tuple[str, str]:
    try:
        model, provider, _, _ = litellm.get_llm_provider(
            model=str(params.get("model") or ""),
            custom_llm_provider=params.get("custom_llm_provider"),
            api_base=params.get("api_base"),
        )
    except litellm.exceptions.BadRequestError:
        return str(params.get("model") or ""), ""
    return str(model), str(provider)


def _lists(name: str, environ: Mapping[str, str]) -> dict[str, list[str]]:
    try:
        given = json.loads(environ.get(name) or "{}")
    except ValueError as e:
        raise ValueError(f"{name} is not JSON: {e}") from e
    if not isinstance(given, dict) or not all(
        isinstance(v, list) and all(isinstance(x, str) for x in v) for v in given.values()
    ):
        raise ValueError(f'{name} must be a JSON object of lists of texts, such as {{"a": ["b", "c"]}}')
    return given


def _share(name: str, environ: Mapping[str, str]) -> float:
    try:
        share = float(environ.get(name) or 1.0)
    except ValueError as e:
        raise ValueError(f"{name} must be a number over 0 and at most 1, such as 0.25") from e
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} is {share:g}; must be over 0 and at most 1")
    return share


guard = Guard(os.environ)
