"""Remediation hooks: signed requests to a platform team's own service, each done once, its outcome known or said to be unknown."""

from flyball.remediation.hooks._settings import HookSettings, allowed_of, hooks_client
from flyball.remediation.hooks.client import HookClient
from flyball.remediation.hooks.dispatcher import (
    Dispatcher,
    HookDispatchSettings,
    OperationRow,
    OperationStore,
)
from flyball.remediation.hooks.wire import is_terminal, verify_callback

__all__ = [
    "Dispatcher",
    "HookClient",
    "HookDispatchSettings",
    "HookSettings",
    "OperationRow",
    "OperationStore",
    "allowed_of",
    "hooks_client",
    "is_terminal",
    "verify_callback",
]
