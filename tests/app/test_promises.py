"""docs/promises.md: what is promised names the test that holds it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text()


@functools.cache
def named_tests() -> frozenset[str]:
    sources = (path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    return frozenset(name for text in sources for name in re.findall(r"^def (test_\w+)\(", text, re.M))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", PAGE))))
def test_a_test_that_is_named_exists(name: str) -> None:
    assert name in named_tests()


def promises() -> list[str]:
    """Rows of the tables of promises, and of the sixteen rules."""
    found = []
    for part in re.split(r"^## ", PAGE, flags=re.M):
        if part.startswith(("Exactness", "A person's hand", "Sixteen rules")):
            found += [
                row for row in re.findall(r"^\| (.+) \|$", part, re.M) if not row.startswith(("promise", "#"))
            ]
    return found


def test_there_are_promises() -> None:
    assert len(promises()) >= 30


@pytest.mark.parametrize("row", promises(), ids=lambda row: re.sub(r"\W+", "-", row)[:50])
def test_a_promise_names_what_holds_it(row: str) -> None:
    measured = "flyball lab score" in row
    assert re.search(r"`test_\w+`", row) or measured
