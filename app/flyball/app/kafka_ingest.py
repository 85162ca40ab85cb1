"""Ingest that writes to Kafka's topics: what `flyball run --kafka` appends to in place of a log of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from flyball.app.store.rows import DeadLetter
from flyball.app.writer import Limits, Overloaded
from flyball.core.errors import NotAccepted
from flyball.core.events import TYPE_NAMES, Event
from flyball.core.ports import Clock
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import KafkaLetter, to_headers
from flyball.streams.kafka.producer import MOST_EVENT_BYTES, Letter, Part, Producer, ProducerSettings


class KafkaIngest:
    """An `Intake` whose futures resolve once Kafka has acknowledged all of a body.

    Everything but `encode` is for the thread of the loop on which `start` ran.
    """

    def __init__(
        self,
        config: KafkaConfig,
        clock: Clock,
        limits: Limits | None = None,
        producer: ProducerSettings | None = None,
    ) -> None:
        self.config = config
        self._clock = clock
        self._limits = limits or Limits()
        self._held = 0
        self.producer = Producer(config, producer)
        self.started_at = clock.now()
        self.received: Counter[str] = Counter()
        """Events that Kafka has acknowledged since the start, copies included, by format."""
        self.events: Counter[str] = Counter()
        """The same by type."""
        self.rejected: Counter[str] = Counter()
        """Events that could not be taken since the start, by reason."""
        self.unacknowledged = 0
        """Bodies whose senders were told that they were not acknowledged."""

    @property
    def clock(self) -> Clock:
        return self._clock

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises: ConfigError when no broker answers or a topic is missing."""
        await self.producer.start()

    async def stop(self, timeout_s: float = 30.0) -> bool:
        """Waits until all that was taken is acknowledged. False when it was not, in time."""
        return await self.producer.stop(timeout_s)

    def on_failure(self, call: Callable[[], None]) -> None:
        self.producer.on_failure = call

    @property
    def ready(self) -> bool:
        return self.producer.reachable and self.failure is None

    @property
    def failure(self) -> BaseException | None:
        return self.producer.failure

    @property
    def pending_bytes(self) -> int:
        """Bytes of bodies that are being read, or are not acknowledged."""
        return self._held + self.producer.pending_bytes

    # --- in -------------------------------------------------------------------------------------------------------

    def encode(self, events: list[Event]) -> list[Part]:
        """Any thread may call it. Raises: Failed when an event is too large for a record."""
        return self.producer.encode(events)

    def admit(self, size: int, patient: bool = True) -> None:
        """Raises: Overloaded when the memory budget is spent; NotAccepted while no broker answers."""
        if not self.producer.reachable:
            raise NotAccepted("no Kafka broker answers; nothing was taken", retry_after_s=5.0)
        if self.pending_bytes + size > self._limits.pending_bytes * (1 if patient else 2):
            raise Overloaded("memory for bodies that Kafka has not acknowledged is spent", 1.0)

    def hold(self, size: int) -> None:
        self._held += size

    def ingest(
        self, events: list[Event], sender: str, received_at: float, *, format: str = "native",
        dead: Sequence[DeadLetter] = (), patient: bool = True, body: list[Part] | None = None,
    ) -> Future[int]:  # fmt: skip
        """Raises: Overloaded, NotAccepted, Failed. The future: as of `Producer.append`."""
        parts = self.encode(events) if body is None else body
        letters = [_letter(d) for d in dead]
        self.admit(sum(len(p.data) for p in parts) + sum(len(x.data or b"") for x in letters), patient)
        done = self.producer.append(parts, sender, received_at, letters)
        kinds = Counter(TYPE_NAMES[type(e)] for e in events)

        def count(of: Future[int]) -> None:
            if of.cancelled() or of.exception() is not None:
                self.unacknowledged += 1
                return
            self.received[format] += len(events)
            self.events.update(kinds)
            for letter in dead:
                self.rejected[letter.reason] += letter.n

        done.add_done_callback(count)
        return done


def _letter(dead: DeadLetter) -> Letter:
    """As what a worker puts aside, but of no topic: it came over HTTP. Without bytes where a setting says so, or where they do not fit."""
    fits = dead.body is not None and len(dead.body) <= MOST_EVENT_BYTES
    of_body = {"flyball-format": dead.format, "sender": dead.sender, "events": str(dead.n)}
    letter = KafkaLetter(
        topic="", partition=-1, offset=-1, reason=dead.reason, detail=dead.detail[:2000], at=dead.at, size=dead.size,
        body=dead.body if fits else None, headers=tuple((k, v.encode("utf-8", "replace")) for k, v in of_body.items()),
    )  # fmt: skip
    return Letter(letter.body, to_headers(letter), letter.key)
