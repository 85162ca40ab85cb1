"""Making topics, seeing what differs from what is wanted, reading lag. For commands and start-up, not for the data path."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from flyball.core.errors import ConfigError, FlyballError
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.reach import REACH_S, BrokerUnreachable, require_reachable
from flyball.streams.kafka.topics import TOPICS, Topic

_REQUEST_MS: Final = 15_000
_OLDEST: Final = (2, 4)
"""Below it, what we send is not understood."""
_TRIED: Final = (4, 0)
"""From here on it is what the tests run against."""
_SKEW_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a cluster that is not as Flyball wants it. With `bad`, a worker must not start.

    `check` is a stable word: address, rights, version, topics, partitions, cleanup, size, retention, copies, clock.
    """

    check: str
    level: Literal["bad", "warn"]
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.mend}" if self.mend else self.what


@dataclass(frozen=True, slots=True)
class Seen:
    """A topic as it is."""

    partitions: int
    copies: int
    settings: Mapping[str, str]
    """Empty where we may not read them."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a group is behind in one partition. `committed` is None where it has committed nothing."""

    group: str
    topic: str
    partition: int
    first: int
    committed: int | None
    end: int

    @property
    def lag(self) -> int:
        return self.end - (self.first if self.committed is None else max(self.committed, self.first))


@contextmanager
def connected(config: KafkaConfig, timeout_s: float = REACH_S) -> Iterator[Any]:
    """kafka-python's admin client, with errors that read well.

    Raises: BrokerUnreachable; FlyballError where the cluster refuses something.
    """
    require_reachable(config, timeout_s)
    from kafka.admin import KafkaAdminClient
    from kafka.errors import AuthorizationError, KafkaError, KafkaTimeoutError

    admin = None
    try:
        admin = KafkaAdminClient(
            **config.for_kafka_python(), bootstrap_timeout_ms=_REQUEST_MS, request_timeout_ms=_REQUEST_MS
        )
        yield admin
    except AuthorizationError as e:
        who = f"user {config.sasl_username!r}" if config.authenticated else "this client"
        raise FlyballError(
            f"the cluster does not allow {who} what is asked ({_bare(e)}); grant Describe, DescribeConfigs, Read and Write on topics and groups {config.prefix}*"
        ) from e
    except KafkaTimeoutError as e:
        raise BrokerUnreachable(
            f"Kafka at {','.join(config.servers)} answers, but its brokers do not ({_bare(e)}); see whether the addresses in"
            " advertised.listeners can be reached from here"
        ) from e
    except KafkaError as e:
        raise FlyballError(f"Kafka says: {_bare(e)}") from e
    finally:
        if admin is not None:
            admin.close()


def wanted(partitions: int, names: Iterable[str] = TOPICS) -> list[Topic]:
    """The topics of these names with `partitions` where the number is not fixed.

    >>> [(t.name, t.partitions) for t in wanted(4, ["llm-calls", "changes"])]
    [('llm-calls', 4), ('changes', 1)]
    """
    return [replace(t, partitions=t.partitions or partitions) for t in (TOPICS[n] for n in names)]


# --- looking -------------------------------------------------------------------------------------------------------


def check_cluster(config: KafkaConfig, needed: Iterable[Topic], timeout_s: float = REACH_S) -> list[Problem]:
    """What is not as wanted, the worst first; empty when all is well. `needed`: see `wanted`.

    Raises: ConfigError when the clients are not installed.
    """
    try:
        with connected(config, timeout_s) as admin:
            found = [*_version(admin), *_topics(config, admin, list(needed))]
    except FlyballError as e:
        if isinstance(e, ConfigError):
            raise
        return [Problem("address" if isinstance(e, BrokerUnreachable) else "rights", "bad", *_halves(str(e)))]
    return sorted(found, key=lambda p: p.level != "bad")


def require_cluster(
    config: KafkaConfig, needed: Iterable[Topic], timeout_s: float = REACH_S
) -> list[Problem]:
    """The same for a start: gives what is only a warning.

    Raises: ConfigError, one for all that is bad.
    """
    found = check_cluster(config, needed, timeout_s)
    bad = [p for p in found if p.level == "bad"]
    if len(bad) == 1:
        raise ConfigError(str(bad[0]))
    if bad:
        raise ConfigError(
            f"the Kafka cluster is not ready, {len(bad)} things:\n" + "\n".join(f"  {p}" for p in bad)
        )
    return found


def describe(config: KafkaConfig, admin: Any, topics: Iterable[Topic]) -> dict[str, Seen]:
    """Topics that are there, by name without prefix."""
    from kafka.admin import ConfigResource

    full = {config.topic(t.name): t.name for t in topics}
    there = {t["name"]: t for t in _described(admin, list(full))}
    if not there:
        return {}
    resources = [ConfigResource("TOPIC", name) for name in there]
    settings = admin.describe_configs(resources, config_filter="all").get("topic", {})
    return {
        full[name]: Seen(
            partitions=len(t["partitions"]),
            copies=min((len(p["replica_nodes"]) for p in t["partitions"]), default=0),
            settings={k: str(v["value"]) for k, v in settings.get(name, {}).items()},
        )
        for name, t in there.items()
    }


def _described(admin: Any, names: list[str]) -> list[dict[str, Any]]:
    """Those of the topics that are there. Raises: AuthorizationError, kafka-python's, for those we may not see."""
    from kafka.errors import AuthorizationError, for_code

    found = []
    for topic in admin.describe_topics(names):
        error = for_code(topic["error_code"])
        if issubclass(error, AuthorizationError):
            raise error(f"Describe on {topic['name']}")
        if topic["partitions"]:
            found.append(topic)
    return found


def differences(config: KafkaConfig, topic: Topic, seen: Seen) -> Iterator[Problem]:
    """What about a topic is not as wanted. More partitions, longer retention and larger records are fine."""
    name, have, want = config.topic(topic.name), seen.settings, topic.settings()
    if seen.partitions < (topic.partitions or 1):
        yield Problem(
            "partitions",
            "bad",
            f"topic {name} has {_count(seen.partitions, 'partition')}, {topic.partitions} are wanted",
            f"stop the workers and say `flyball topics create --mend --partitions {topic.partitions}`, or set kafka.partitions to {seen.partitions}",
        )
    mend = "say `flyball topics create --mend`"
    policy = have.get("cleanup.policy", topic.cleanup)
    if set(policy.split(",")) != {topic.cleanup}:
        why = (
            "older records of a key would stay, or be lost with age"
            if topic.cleanup == "compact"
            else "only one record of each key would stay"
        )
        yield Problem(
            "cleanup",
            "bad",
            f"topic {name} has cleanup.policy {policy}, {topic.cleanup} is wanted: {why}",
            mend,
        )
    elif topic.cleanup == "delete":
        kept_ms = int(have.get("retention.ms", "-1"))
        if 0 <= kept_ms < int(want["retention.ms"]):
            yield Problem(
                "retention",
                "warn",
                f"topic {name} keeps records for {_span(kept_ms / 1000)}, {_span(topic.retention_s)} are wanted: a worker that is down for longer loses the rest",
                mend,
            )
    if int(have.get("max.message.bytes", topic.max_message_bytes)) < topic.max_message_bytes:
        yield Problem(
            "size",
            "bad",
            f"topic {name} takes records up to {int(have['max.message.bytes']):,} bytes, {topic.max_message_bytes:,} are wanted",
            mend,
        )


def _version(admin: Any) -> Iterator[Problem]:
    found = broker_version(admin)
    said = ".".join(map(str, found))
    if found < _OLDEST:
        yield Problem(
            "version",
            "bad",
            f"the brokers are of version {said}",
            "use 2.4 or newer; 4.3 is what the tests run against",
        )
    elif found < _TRIED:
        yield Problem(
            "version",
            "warn",
            f"the brokers are of version {said}",
            "4.0 and newer are what Flyball is tested with",
        )


def broker_version(admin: Any) -> tuple[int, ...]:
    """The oldest among the brokers that answer, as far as their interfaces tell it."""
    from kafka.errors import KafkaError

    found = []
    for broker in live_brokers(admin):
        # One that died a moment ago is listed until its session ends.
        with suppress(KafkaError):
            found.append(tuple(admin.get_broker_version_data(broker).broker_version))
    return min(found, default=_TRIED)


def live_brokers(admin: Any) -> list[int]:
    """Numbers of the brokers that the cluster counts on."""
    return [b["broker_id"] for b in admin.describe_cluster()["brokers"] if not b.get("is_fenced")]


def _topics(config: KafkaConfig, admin: Any, needed: list[Topic]) -> Iterator[Problem]:
    seen = describe(config, admin, needed)
    missing = [t for t in needed if t.name not in seen]
    if missing:
        names = ", ".join(config.topic(t.name) for t in missing)
        partitions = max((t.partitions or 1) for t in missing)
        yield Problem(
            "topics",
            "bad",
            f"{_count(len(missing), 'topic')} missing: {names}",
            f"say `flyball topics create --kafka {config.bootstrap}{f' --partitions {partitions}' if partitions > 1 else ''}`",
        )
    for topic in needed:
        if topic.name in seen:
            yield from differences(config, topic, seen[topic.name])
    brokers = len(live_brokers(admin))
    alone = [config.topic(n) for n, s in seen.items() if s.copies < 2 <= brokers]
    if alone:
        yield Problem(
            "copies",
            "warn",
            f"{brokers} brokers, but {_count(len(alone), 'topic')} with one copy ({', '.join(alone[:3])}…): what is on a lost broker is lost",
            "raise default.replication.factor, then make the topics anew or reassign their partitions",
        )


def clock_skew(config: KafkaConfig, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that the broker's clock is ahead of `now`; None where the topic `clock` is missing.

    Kafka tells its time only in what it stamps: this writes one record, which the broker stamps and keeps for an hour.
    """
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

    require_reachable(config)
    with connected(config) as admin:
        if not describe(config, admin, [TOPICS["clock"]]):
            return None
    producer = KafkaProducer(**config.for_kafka_python(), acks="all", max_block_ms=_REQUEST_MS, request_timeout_ms=_REQUEST_MS, delivery_timeout_ms=2 * _REQUEST_MS)  # fmt: skip
    try:
        producer.partitions_for(config.topic("clock"))  # so that the way there is not in the measured time
        before = now()
        stamped = producer.send(config.topic("clock"), b"{}").get(_REQUEST_MS / 1000).timestamp / 1000
        after = now()
    except KafkaError as e:
        raise FlyballError(
            f"the broker's clock cannot be read ({_bare(e)}); grant Write on {config.topic('clock')}"
        ) from e
    finally:
        producer.close(1.0)
    return 0.0 if before <= stamped <= after else stamped - (before if stamped < before else after)


def check_clock(config: KafkaConfig, now: Callable[[], float] = time.time) -> list[Problem]:
    skew_s = clock_skew(config, now)
    if skew_s is None or abs(skew_s) <= _SKEW_S:
        return []
    return [
        Problem(
            "clock",
            "warn",
            f"the broker's clock is {skew_s:+.1f} s off this machine's",
            "set both (NTP): retention goes by the broker's, events by the senders'",
        )
    ]


# --- making --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What `create_topics` did about one topic, or found."""

    topic: str
    did: Literal["made", "mended", "as wanted", "differs"]
    detail: str = ""


def create_topics(
    config: KafkaConfig, topics: Iterable[Topic], *, copies: int = -1, mend: bool = False
) -> list[Change]:
    """Makes what is missing. What is there is left as it is and told, or brought to what is wanted with `mend`.

    Args:
        copies: replicas of new topics; -1 leaves it to the broker.
        mend: set policy, retention and size, add partitions. Never takes partitions away or shortens retention.

    Raises: BrokerUnreachable, FlyballError.
    """
    topics = list(topics)
    with connected(config) as admin:
        seen = describe(config, admin, topics)
        missing = [t for t in topics if t.name not in seen]
        if missing:
            _make(config, admin, missing, copies)
        done = []
        for topic in topics:
            name = config.topic(topic.name)
            if topic.name not in seen:
                done.append(
                    Change(name, "made", f"{_count(topic.partitions or 1, 'partition')}, {kept(topic)}")
                )
                continue
            found = list(differences(config, topic, seen[topic.name]))
            if found and mend:
                _mend(name, admin, topic, {p.check for p in found})
                done.append(Change(name, "mended", "; ".join(p.what for p in found)))
            elif found:
                done.append(Change(name, "differs", "; ".join(p.what for p in found)))
            else:
                done.append(Change(name, "as wanted", _count(seen[topic.name].partitions, "partition")))
        return done


def _make(config: KafkaConfig, admin: Any, missing: list[Topic], copies: int) -> None:
    from kafka.errors import for_code

    asked = {
        config.topic(t.name): {
            "num_partitions": t.partitions or 1,
            "replication_factor": copies,
            "configs": t.settings(),
        }
        for t in missing
    }
    answer = admin.create_topics(asked, raise_errors=False)
    # Made by somebody else in the meantime is made all the same.
    failed = [
        f"{t['name']}: {t['error_message'] or for_code(t['error_code']).__name__}"
        for t in answer["topics"]
        if t["error_code"] and for_code(t["error_code"]).__name__ != "TopicAlreadyExistsError"
    ]
    if failed:
        raise FlyballError(f"topics cannot be made: {'; '.join(failed)}")
    admin.wait_for_topics(list(asked))


def _mend(name: str, admin: Any, topic: Topic, wrong: set[str]) -> None:
    from kafka.admin import ConfigResource

    if "partitions" in wrong:
        admin.create_partitions({name: topic.partitions})
    want = topic.settings()
    keys = {"cleanup": tuple(want), "retention": ("retention.ms",), "size": ("max.message.bytes",)}
    settings = {key: want[key] for check in sorted(wrong) for key in keys.get(check, ())}
    if settings:
        admin.alter_configs([ConfigResource("TOPIC", name, settings)])


# --- lag -----------------------------------------------------------------------------------------------------------


def lags(config: KafkaConfig) -> list[Lag]:
    """Of every group of ours that has committed something, by group, topic and partition."""
    from kafka.admin import OffsetSpec

    with connected(config) as admin:
        ours = config.group("")
        groups = sorted(g["group_id"] for g in admin.list_groups() if g["group_id"].startswith(ours))
        if not groups:
            return []
        committed = admin.list_group_offsets(groups)
        topics = {tp.topic for offsets in committed.values() for tp in offsets}
        every = {
            t["name"]: len(t["partitions"])
            for t in admin.describe_topics(sorted(topics))
            if not t["error_code"]
        }
        partitions = {tp for offsets in committed.values() for tp in offsets if tp.topic in every}
        partitions |= {type(tp)(tp.topic, p) for tp in list(partitions) for p in range(every[tp.topic])}
        ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
        firsts = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.EARLIEST))
    return [
        Lag(group, tp.topic, tp.partition, firsts[tp].offset, _offset(offsets.get(tp)), ends[tp].offset)
        for group, offsets in sorted(committed.items())
        for tp in sorted(partitions)
        if tp.topic in {o.topic for o in offsets}
    ]


def _offset(found: Any) -> int | None:
    return found.offset if found is not None and found.offset >= 0 else None


# --- words ---------------------------------------------------------------------------------------------------------


def kept(topic: Topic) -> str:
    """`kept for 7 days` or `newest of each key`."""
    return "newest of each key" if topic.cleanup == "compact" else f"kept for {_span(topic.retention_s)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _span(seconds: float) -> str:
    for length_s, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length_s and seconds % length_s == 0:
            return _count(int(seconds // length_s), name)
    return f"{seconds:g} s"


def _bare(error: Exception) -> str:
    """kafka-python writes `[Error 3] UnknownTopicOrPartitionError: text`."""
    return re.sub(r"^(\[Error -?\d+\] )?\w+(: |$)", "", str(error)) or type(error).__name__


def _halves(text: str) -> tuple[str, str]:
    what, _, mend = text.partition("; ")
    return what, mend
