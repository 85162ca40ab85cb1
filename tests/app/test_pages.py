"""What counts as a page: in `flyball status`, in a replay's summary, on quiet days of the lab."""

from __future__ import annotations

from flyball.app.pipeline import is_page
from tests.incidents._estate import Lab, traffic


def test_an_incident_that_rises_to_a_page_counts_once() -> None:
    lab = Lab()
    lab.quiet(12)
    a = lab.on("llm.errors", "overloaded", provider="b")
    lab.step(traffic(fails=0.05, where={"provider": "b"}, n=20), a)
    assert [is_page(c) for c in lab.changes] == [False] * len(lab.changes)
    for _ in range(6):
        lab.step(traffic(fails=0.5, where={"provider": "b"}, n=20), lab.again(a))
    assert sum(map(is_page, lab.changes)) == 1
