"""The board of directives: ETag, long poll, expiry."""

from __future__ import annotations

import asyncio

from flyball.app.board import DirectiveBoard
from flyball.core.directives import Directive, DirectiveChange


class FakeClock:
    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


def lease(id: str = "d1", expires_at: float = 2000.0) -> Directive:
    return Directive(
        id=id, kind="redirect", scope={"provider": "b"}, params={}, granted_at=1000.0, expires_at=expires_at,
        incident="INC-1", runbook="r", step="s",
    )  # fmt: skip


def test_the_etag_changes_with_the_set_and_only_then() -> None:
    board = DirectiveBoard(FakeClock())
    empty = board.read()[0]
    board.put([lease()])
    granted = board.read()[0]
    assert granted != empty
    assert board.read()[0] == granted
    board.change([DirectiveChange(directive=lease(), at=1001.0, change="released", reason="recovered")])
    assert board.read()[0] == empty


def test_what_has_expired_is_not_shown_even_if_nobody_said_so() -> None:
    clock = FakeClock()
    board = DirectiveBoard(clock)
    board.put([lease(expires_at=1500.0)])
    clock.at = 1500.0
    assert board.read()[1] == []


def test_a_long_poll_answers_as_soon_as_a_directive_is_granted() -> None:
    async def scenario() -> list[Directive]:
        board = DirectiveBoard(FakeClock())
        known = board.read()[0]
        poll = asyncio.create_task(board.wait(known, 30.0))
        await asyncio.sleep(0)  # let the poll begin
        board.change([DirectiveChange(directive=lease(), at=1001.0, change="granted", reason="plan")])
        return (await asyncio.wait_for(poll, 5.0))[1]

    assert [d.id for d in asyncio.run(scenario())] == ["d1"]


def test_a_long_poll_without_change_ends_with_the_same_etag() -> None:
    async def scenario() -> bool:
        board = DirectiveBoard(FakeClock())
        known = board.read()[0]
        return (await board.wait(known, 0.01))[0] == known

    assert asyncio.run(scenario())
