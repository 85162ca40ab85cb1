"""Messages get there at least once, the newest first, and a channel that is down harms no other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import httpx
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from flyball.core.errors import Ambiguous, Failed, NotAccepted
from flyball.core.ids import short_id
from flyball.core.incident import IncidentChange, State
from flyball.remediation.notifiers._base import Delivery, Gone, Receipt
from flyball.remediation.notifiers._settings import NotifySettings
from flyball.remediation.outbox import (
    FAILED_RETRY_S,
    RETRY_S,
    Dispatcher,
    DispatchSettings,
    OutboxRow,
    build_notifiers,
)
from flyball.remediation.render import Renderer
from tests.remediation._incidents import AT, opened, outage, resolved
from tests.remediation._receiver import Answer, offline_client, receiver

RENDERER = Renderer()


@dataclass
class Time:
    at: float = AT

    def now(self) -> float:
        return self.at


@dataclass
class Entry:
    row: OutboxRow
    due_at: float = 0.0
    state: str = "pending"
    why: str = ""
    receipt: Receipt | None = None


@dataclass
class MemoryStore:
    """The outbox's contract, in a dict."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def put(self, change: IncidentChange, channel: str = "chat", why: str = "a rule") -> str:
        i = change.incident
        id = short_id("MSG", i.id, i.revision, channel)
        row = OutboxRow(id, i.id, i.revision, channel, msgspec.json.encode(change), why)
        self.entries.setdefault(id, Entry(row))
        return id

    async def due(self, now: float, limit: int) -> Sequence[OutboxRow]:
        found = []
        for e in self.entries.values():
            repeats = e.state == "sent" and e.receipt is not None and e.receipt.repeat_at is not None
            if (e.state == "pending" or (repeats and not self._newer(e))) and e.due_at <= now:
                found.append(replace(e.row, receipt=self._last(e.row)))
        return found[:limit]

    def _same(self, row: OutboxRow) -> list[Entry]:
        return [
            e for e in self.entries.values() if (e.row.incident, e.row.channel) == (row.incident, row.channel)
        ]

    def _newer(self, entry: Entry) -> bool:
        return any(e.row.revision > entry.row.revision for e in self._same(entry.row))

    def _last(self, row: OutboxRow) -> str:
        sent = [e for e in self._same(row) if e.receipt is not None and e.receipt.status == "sent"]
        return max(sent, key=lambda e: e.row.revision).receipt.to_text() if sent else ""  # type: ignore[union-attr]

    async def done(self, id: str, receipt: Receipt) -> None:
        e = self.entries[id]
        e.state, e.receipt = receipt.status, receipt
        if receipt.repeat_at is not None:
            e.due_at, e.row = receipt.repeat_at, replace(e.row, attempts=0)

    async def retry(self, id: str, at: float, why: str) -> None:
        e = self.entries[id]
        e.due_at, e.why, e.row = at, why, replace(e.row, attempts=e.row.attempts + 1)

    async def dead(self, id: str, why: str) -> None:
        self.entries[id].state, self.entries[id].why = "dead", why

    def states(self) -> list[str]:
        return [e.state for e in self.entries.values()]


class Chat:
    """A channel that does what it is told next, then takes everything."""

    kind: ClassVar[str] = "chat"
    wakes: ClassVar[bool] = False
    Params: ClassVar[type[BaseModel]] = BaseModel
    buttons = False

    def __init__(self, *answers: Exception | None, repeat_s: float | None = None) -> None:
        self.answers = list(answers)
        self.got: list[Delivery] = []
        self.tries = 0
        self.repeat_s = repeat_s
        self.gate: asyncio.Event | None = None
        self.at_once = self.most_at_once = 0

    @classmethod
    def edits(cls, params: Any) -> bool:
        return True

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        self.tries += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
        finally:
            self.at_once -= 1
        if self.answers and (error := self.answers.pop(0)):
            raise error
        self.got.append(delivery)
        again = (
            delivery.now + self.repeat_s
            if self.repeat_s and delivery.incident.state != State.RESOLVED
            else None
        )
        return delivery.receipt("ref-1", repeat_at=again)

    @property
    def revisions(self) -> list[int]:
        return [d.incident.revision for d in self.got]


def run(
    work: Callable[[Dispatcher], Awaitable[Any]],
    store: MemoryStore,
    clock: Time,
    channels: dict[str, Any],
    **more: Any,
) -> Dispatcher:
    async def main() -> Dispatcher:
        async with offline_client() as client:
            d = Dispatcher(store, channels, RENDERER, client, clock=clock, rng=random.Random(1), **more)
            await work(d)
            return d

    return asyncio.run(main())


async def until(true: Callable[[], bool]) -> None:
    """Lets other tasks go on until something holds; by turns of the loop, not by time."""
    for _ in range(10_000):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


def drain(store: MemoryStore, clock: Time, channels: dict[str, Any], **more: Any) -> Dispatcher:
    return run(lambda d: d.drain(), store, clock, channels, **more)


def revised(revision: int, incident: str = "INC-A", notify: bool = True) -> IncidentChange:
    old = "" if revision == 1 else "open"
    return opened(outage(id=incident, revision=revision), old=old, notify=notify)


def test_a_due_message_is_sent_once_and_says_why() -> None:
    store, chat = MemoryStore(), Chat()
    store.put(opened(), why="severity ≥ high on owner llm-platform")
    d = drain(store, Time(), {"chat": chat})
    drain(store, Time(), {"chat": chat})
    (got,) = chat.got
    assert got.message.lines[-1] == "Why you: severity ≥ high on owner llm-platform; first notice"
    assert (got.previous, got.now) == (None, AT)
    assert store.states() == ["sent"]
    assert d.counts == {"sent": 1}


def test_only_the_newest_state_of_an_incident_is_sent_and_counts_as_news() -> None:
    store, chat = MemoryStore(), Chat()
    for change in (revised(2), revised(1), revised(3, notify=False), revised(1, "INC-B")):
        store.put(change)
    drain(store, Time(), {"chat": chat})
    assert sorted((d.incident.id, d.incident.revision) for d in chat.got) == [("INC-A", 3), ("INC-B", 1)]
    assert all(d.notify for d in chat.got), "what was superseded unsent had to be told"
    assert store.states() == ["superseded", "superseded", "sent", "sent"]


def test_what_is_superseded_stays_until_its_successor_is_sent() -> None:
    store, chat, clock = MemoryStore(), Chat(Ambiguous("no answer")), Time()
    store.put(revised(1))
    store.put(revised(2))
    drain(store, clock, {"chat": chat})
    assert store.states() == ["pending", "pending"]
    clock.at += 2
    drain(store, clock, {"chat": chat})
    assert store.states() == ["superseded", "sent"]
    assert chat.revisions == [2]


def test_an_older_message_whose_time_comes_late_is_not_sent_after_a_newer_one() -> None:
    store, chat, clock = MemoryStore(), Chat(NotAccepted("down")), Time()
    store.put(revised(1))
    drain(store, clock, {"chat": chat})
    store.put(revised(2))
    drain(store, clock, {"chat": chat})
    clock.at += 10
    drain(store, clock, {"chat": chat})
    assert chat.revisions == [2]
    assert store.states() == ["superseded", "sent"]


def test_the_next_message_knows_what_was_sent_before() -> None:
    store, chat = MemoryStore(), Chat()
    store.put(opened())
    drain(store, Time(), {"chat": chat})
    store.put(resolved())
    drain(store, Time(), {"chat": chat})
    previous = chat.got[1].previous
    assert previous is not None
    assert (previous.ref, previous.revision, previous.state, previous.severity) == ("ref-1", 1, "open", 3)
    assert chat.got[1].message.reason == "resolved"


def test_it_is_not_known_whether_it_arrived_so_it_is_sent_again_with_the_same_id() -> None:
    store, chat, clock = MemoryStore(), Chat(Ambiguous("sent, no answer"), Ambiguous("again")), Time()
    id = store.put(opened())
    for _ in range(3):
        drain(store, clock, {"chat": chat})
        clock.at += 10
    assert [d.id for d in chat.got] == [id]
    assert chat.tries == 3


def test_waits_grow_with_jitter_until_it_is_given_up_after_a_day() -> None:
    store, chat, clock = MemoryStore(), Chat(*(NotAccepted("down") for _ in range(99))), Time()
    id = store.put(opened())
    waits = []
    while store.entries[id].state == "pending":
        drain(store, clock, {"chat": chat})
        waits.append(store.entries[id].due_at - clock.at)
        clock.at = max(clock.at, store.entries[id].due_at)
    assert all(least <= wait <= 1.25 * least for least, wait in zip(RETRY_S, waits, strict=False))
    assert chat.tries == len(RETRY_S) + 1
    assert store.entries[id].why == f"down (try {len(RETRY_S) + 1})"
    assert 20 * 3600 < clock.at - AT < 36 * 3600


def test_the_same_seed_gives_the_same_waits() -> None:
    def first_wait() -> float:
        store = MemoryStore()
        id = store.put(opened())
        drain(store, Time(), {"chat": Chat(NotAccepted("down"))})
        return store.entries[id].due_at

    assert first_wait() == first_wait()


def test_a_no_after_a_long_outage_is_a_first_no() -> None:
    store, clock, chat = MemoryStore(), Time(), Chat(*(NotAccepted("down") for _ in range(9)), Failed("403"))
    store.put(opened())

    async def work(d: Dispatcher) -> None:
        for _ in range(12):
            await d.drain()
            clock.at += 5000

    run(work, store, clock, {"chat": chat})
    assert store.states() == ["sent"]


def test_a_plain_no_is_tried_twice_more_and_a_gone_address_never() -> None:
    store, clock = MemoryStore(), Time()
    no, gone = Chat(*(Failed("403") for _ in range(9))), Chat(Gone("410"))
    store.put(opened(), "no")
    store.put(opened(), "gone")

    async def work(d: Dispatcher) -> None:
        for _ in range(5):
            await d.drain()
            clock.at += 1000

    run(work, store, clock, {"no": no, "gone": gone})
    assert (no.tries, gone.tries) == (1 + len(FAILED_RETRY_S), 1)
    assert store.states() == ["dead", "dead"]


def test_a_channel_that_asks_to_wait_is_left_alone_for_all_its_messages() -> None:
    store, chat, clock = MemoryStore(), Chat(NotAccepted("429", retry_after_s=120)), Time()
    store.put(revised(1, "INC-A"))

    async def work(d: Dispatcher) -> None:
        await d.drain()
        store.put(revised(1, "INC-B"))
        clock.at += 60
        await d.drain()
        assert chat.tries == 1
        clock.at += 61
        await d.drain()

    run(work, store, clock, {"chat": chat})
    assert sorted(d.incident.id for d in chat.got) == ["INC-A", "INC-B"]


def test_a_faulty_notifier_silences_only_itself() -> None:
    store, bad, good = MemoryStore(), Chat(*(KeyError("bug") for _ in range(9))), Chat()
    store.put(opened(), "bad")
    store.put(opened(), "good")
    d = drain(store, Time(), {"bad": bad, "good": good})
    assert len(good.got) == 1
    assert d.counts["faulty"] == 1
    assert store.states() == ["pending", "sent"]


def test_a_slow_channel_does_not_hold_up_the_others() -> None:
    store, slow, good = MemoryStore(), Chat(), Chat()

    async def work(d: Dispatcher) -> None:
        slow.gate = asyncio.Event()
        for i in range(20):
            store.put(revised(1, f"INC-{i}"), "slow")
        draining = asyncio.create_task(d.drain())
        store.put(opened(), "good")
        await until(lambda: bool(good.got))
        assert slow.got == []
        assert slow.most_at_once == 4
        slow.gate.set()
        await draining

    run(work, store, Time(), {"slow": slow, "good": good})
    assert len(slow.got) == 20


def test_a_send_that_never_ends_is_ended_and_tried_again() -> None:
    store, stuck = MemoryStore(), Chat()

    async def work(d: Dispatcher) -> None:
        stuck.gate = asyncio.Event()
        await d.drain()

    id = store.put(opened())
    run(work, store, Time(), {"chat": stuck}, settings=DispatchSettings(deadline_s=0.01))
    assert store.states() == ["pending"]
    assert store.entries[id].why == "no answer within 0.01 s"
    assert stuck.at_once == 0


def test_an_open_incident_is_repeated_where_the_channel_forgets_and_a_resolved_one_is_not() -> None:
    store, clock, chat = MemoryStore(), Time(), Chat(repeat_s=60)
    store.put(revised(1))
    for _ in range(3):
        drain(store, clock, {"chat": chat})
        clock.at += 60
    assert chat.revisions == [1, 1, 1]
    store.put(resolved(outage(id="INC-A", revision=2, state=State.RESOLVED)))
    for _ in range(3):
        drain(store, clock, {"chat": chat})
        clock.at += 60
    assert chat.revisions == [1, 1, 1, 2]


def test_messages_for_a_channel_that_is_gone_and_rows_that_cannot_be_read_are_given_up() -> None:
    store = MemoryStore()
    store.put(opened(), "old-channel")
    id = store.put(opened(), "chat")
    store.entries[id].row = replace(store.entries[id].row, change=b"{")
    drain(store, Time(), {"chat": Chat()})
    assert store.states() == ["dead", "dead"]
    assert "not in the settings any more" in store.entries[next(iter(store.entries))].why


def test_running_goes_on_until_it_is_stopped_and_lets_what_is_being_sent_finish() -> None:
    store, chat = MemoryStore(), Chat()

    async def work(d: Dispatcher) -> None:
        chat.gate = asyncio.Event()
        stop = asyncio.Event()
        running = asyncio.create_task(d.run(stop))
        store.put(opened())
        d.wake()
        await until(lambda: chat.at_once > 0)
        stop.set()
        await asyncio.sleep(0)
        chat.gate.set()
        await running

    run(work, store, Time(), {"chat": chat}, settings=DispatchSettings(poll_s=60))
    assert store.states() == ["sent"]


faults = st.sampled_from(
    [None, NotAccepted("x"), Ambiguous("x"), NotAccepted("x", retry_after_s=5), Failed("x")]
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from("AB"), faults), min_size=1, max_size=12), st.data()
)
def test_whatever_fails_and_in_whatever_order_the_newest_state_arrives(
    steps: list[Any], data: st.DataObject
) -> None:
    store, clock, chat = MemoryStore(), Time(), Chat()
    for revision, incident, fault in steps:
        store.put(revised(revision, incident))
        chat.answers.append(fault)
        if data.draw(st.booleans()):
            drain(store, clock, {"chat": chat})
        clock.at += data.draw(st.sampled_from([0, 1, 100]))
    for _ in range(20):
        drain(store, clock, {"chat": chat})
        clock.at += 1000
    assert "pending" not in store.states()
    assert "dead" not in store.states()
    for incident in {i for _, i, _ in steps}:
        sent = [d.incident.revision for d in chat.got if d.incident.id == incident]
        assert max(sent) == max(r for r, i, _ in steps if i == incident)
        assert sent == sorted(sent)


def test_through_a_real_socket_from_settings_to_a_slack_compatible_webhook() -> None:
    store, clock = MemoryStore(), Time()

    async def main() -> None:
        async with receiver(Answer(429, headers={"retry-after": "3"}), Answer(500)) as box:
            chosen = NotifySettings.model_validate(
                {"channels": [{"kind": "slack", "url": box.url + "/hook"}]}
            )
            for route in chosen.routes(opened()):
                store.put(opened(), route.channel, route.why)
            async with httpx.AsyncClient(trust_env=False) as client:
                d = Dispatcher(
                    store,
                    build_notifiers(chosen.channels),
                    RENDERER,
                    client,
                    clock=clock,
                    rng=random.Random(1),
                )
                for _ in range(3):
                    await d.drain()
                    clock.at += 10
            assert [r.path for r in box.requests] == ["/hook"] * 3
            assert len({r.body for r in box.requests}) == 1
            assert (
                box.requests[0].json["text"].endswith("Why you: every incident (channel slack); first notice")
            )

    asyncio.run(main())
    assert store.states() == ["sent"]
