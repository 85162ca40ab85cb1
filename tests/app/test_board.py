"""The board of directives: ETag, long poll, expiry."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
import pytest

from flyball.app.board import DirectiveBoard
from flyball.core.directives import Directive, DirectiveChange, StopChange


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


def move(board: DirectiveBoard, change: Literal["granted", "renewed", "released"], **fields: Any) -> None:
    """What the writer does with a change of a lease, once it is durable."""
    draft = board.draft()
    moved = msgspec.structs.replace(lease(), **fields)
    draft.move(DirectiveChange(directive=moved, at=1001.0, change=change, reason="test"))
    board.publish(draft)


def switch(board: DirectiveBoard, change: Literal["stop", "resume"], scope: str) -> None:
    draft = board.draft()
    draft.switch(StopChange(change=change, scope=scope, by="ann", at=1001.0))
    board.publish(draft)


def test_the_etag_changes_with_the_set_and_only_then() -> None:
    board = DirectiveBoard(FakeClock())
    empty = board.read()[0]
    board.put([lease()])
    granted = board.read()[0]
    assert granted != empty
    assert board.read()[0] == granted
    move(board, "released")
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
        move(board, "granted")
        return (await asyncio.wait_for(poll, 5.0))[1]

    assert [d.id for d in asyncio.run(scenario())] == ["d1"]


def test_a_long_poll_without_change_ends_with_the_same_etag() -> None:
    async def scenario() -> bool:
        board = DirectiveBoard(FakeClock())
        known = board.read()[0]
        return (await board.wait(known, 0.01))[0] == known

    assert asyncio.run(scenario())


SCOPES = ("all", "runbook:r", "action:redirect")


@pytest.mark.parametrize("scope", SCOPES)
def test_under_a_stop_no_new_lease_is_seen_and_a_live_one_neither_widens_nor_lasts_longer(scope: str) -> None:
    board = DirectiveBoard(FakeClock())
    move(board, "granted", id="before", params={"share": 0.1})
    switch(board, "stop", scope)
    move(board, "granted", id="after")
    move(board, "renewed", id="before", params={"share": 1.0}, epoch=2, expires_at=9000.0)
    seen = board.read()[1]
    assert [(d.id, d.params, d.epoch, d.expires_at) for d in seen] == [("before", {"share": 0.1}, 1, 2000.0)]
    move(board, "released", id="before")
    assert board.read()[1] == []


@pytest.mark.parametrize("scope", SCOPES)
def test_once_a_stop_is_taken_back_what_was_held_back_is_seen(scope: str) -> None:
    board = DirectiveBoard(FakeClock())
    switch(board, "stop", scope)
    move(board, "granted", id="after")
    assert board.read()[1] == []
    switch(board, "resume", scope)
    assert [d.id for d in board.read()[1]] == ["after"]


def test_a_stop_of_another_runbook_or_kind_holds_nothing_back() -> None:
    board = DirectiveBoard(FakeClock())
    for scope in ("runbook:other", "action:block", "tenant:t9"):
        switch(board, "stop", scope)
    move(board, "granted", id="d", scope={"tenant": "t1"})
    assert [(d.id, d.exempt) for d in board.read()[1]] == [("d", ())]


def test_a_tenant_for_whom_flyball_is_stopped_is_exempt_from_wider_leases_and_gets_none_of_its_own() -> None:
    board = DirectiveBoard(FakeClock())
    move(board, "granted", id="wide")
    before = board.read()[0]
    switch(board, "stop", "tenant:t1")
    move(board, "granted", id="own", scope={"tenant": "t1"})
    tag, seen = board.read()
    assert [(d.id, d.exempt) for d in seen] == [("wide", ({"tenant": "t1"},))]
    assert tag != before
    switch(board, "resume", "tenant:t1")
    assert [(d.id, d.exempt) for d in board.read()[1]] == [("own", ()), ("wide", ())]


def test_the_kill_switch_wakes_a_long_poll() -> None:
    async def scenario() -> list[Directive]:
        board = DirectiveBoard(FakeClock())
        move(board, "granted")
        poll = asyncio.create_task(board.wait(board.read()[0], 30.0))
        await asyncio.sleep(0)  # let the poll begin
        switch(board, "stop", "tenant:t1")
        return (await asyncio.wait_for(poll, 5.0))[1]

    assert [d.exempt for d in asyncio.run(scenario())] == [({"tenant": "t1"},)]
