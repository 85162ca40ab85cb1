"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["graph", "lifecycle", "ranking", "silences", "text"])
def test_examples_of_the_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"flyball.incidents.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
