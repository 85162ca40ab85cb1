"""What every test may use. Helpers live beside the tests that need them."""

from __future__ import annotations

import os

import pytest


def require_server(name: str, reason: str) -> None:
    """Skips the test because server `name` cannot be had; where FLYBALL_REQUIRE_SERVERS=1 (CI), fails it instead."""
    if os.environ.get("FLYBALL_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{name} is required here but cannot be had: {reason}")
    pytest.skip(f"{name}: {reason}")
