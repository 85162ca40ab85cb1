"""`flyball topics …`: the Kafka topics that the workers need, and how far they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyball.app.cli._common import AsJson, Config, Unreachable, print_json
from flyball.core.errors import ConfigError

if TYPE_CHECKING:
    from flyball.app.settings import KafkaSettings
    from flyball.streams.kafka.config import KafkaConfig

Kafka = Annotated[
    str | None,
    typer.Option(
        "--kafka",
        metavar="ADDRESS",
        help="`host:port` of the cluster, several between commas; else as the settings say (FLYBALL_KAFKA).",
        show_default="",
    ),
]


def add_to(app: typer.Typer) -> None:
    topics = typer.Typer(help="Kafka topics: make them, compare them, see lag.", no_args_is_help=True)
    topics.command("create")(create)
    topics.command("list")(list_)
    topics.command("lag")(lag)
    app.add_typer(topics, name="topics")


@contextmanager
def cluster(config: Path | None, kafka: str | None) -> Iterator[tuple[KafkaSettings, KafkaConfig]]:
    """The cluster that is meant. Raises: ConfigError where none is; Unreachable where it does not answer."""
    from flyball.app.settings import load
    from flyball.streams.kafka.reach import BrokerUnreachable

    settings = load(config, kafka=kafka or None).kafka
    if not settings.bootstrap:
        raise ConfigError("no Kafka cluster is named; give --kafka host:port, or set FLYBALL_KAFKA")
    try:
        yield settings, settings.config()
    except BrokerUnreachable as e:
        raise Unreachable(str(e)) from e


def create(
    kafka: Kafka = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Of the topics that events come in by.",
            show_default="kafka.partitions, 8",
        ),
    ] = None,
    replication: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Copies of each new topic.", show_default="as the broker is set"),
    ] = None,
    mend: Annotated[
        bool,
        typer.Option(
            "--mend",
            help="Also bring what is there to what is wanted. Takes nothing away; stop the workers before adding partitions.",
        ),
    ] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Makes the topics that are missing, and says what differs in those that are there. Exit code 1 when something does.

    Examples:

      flyball topics create --kafka 127.0.0.1:9092 --partitions 8

      flyball topics create --kafka 127.0.0.1:9092 --mend
    """
    from flyball.streams.kafka.admin import create_topics, wanted

    with cluster(config, kafka) as (settings, reach):
        done = create_topics(
            reach,
            wanted(partitions or settings.partitions),
            copies=replication or settings.replication,
            mend=mend,
        )
    for change in done:
        if as_json:
            print_json({"topic": change.topic, "did": change.did, "detail": change.detail})
        else:
            print(f"{change.did:9}  {change.topic}: {change.detail}")
    if any(change.did == "differs" for change in done):
        if not as_json:
            print("bring them to what is wanted with: flyball topics create --mend")
        raise typer.Exit(1)


def list_(kafka: Kafka = None, config: Config = None, as_json: AsJson = False) -> None:
    """The topics, what stands in them, how they are kept, and what is not as wanted.

    Examples:

      flyball topics list --kafka 127.0.0.1:9092

      flyball topics list --kafka 127.0.0.1:9092 --json
    """
    from flyball.streams.kafka.admin import connected, describe, differences, kept, wanted

    with cluster(config, kafka) as (settings, reach), connected(reach) as admin:
        topics = wanted(settings.partitions)
        seen = describe(reach, admin, topics)
    for topic in topics:
        there = seen.get(topic.name)
        wrong = [p.what for p in differences(reach, topic, there)] if there else ["missing"]
        if as_json:
            print_json(
                {
                    "topic": reach.topic(topic.name),
                    "what": topic.what,
                    "partitions": there.partitions if there else 0,
                    "wanted_partitions": topic.partitions,
                    "copies": there.copies if there else 0,
                    "settings": {k: there.settings.get(k) for k in topic.settings()} if there else {},
                    "wanted_settings": topic.settings(),
                    "differs": wrong,
                }
            )
            continue
        size = f"{there.partitions}x{there.copies}" if there else "missing"
        print(f"{reach.topic(topic.name):24} {size:8} {kept(topic):20} {topic.what}")
        if there:
            for line in wrong:
                print(f"    {line}")


def lag(
    kafka: Kafka = None,
    by_partition: Annotated[bool, typer.Option("--by-partition", help="A line for each partition.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """How many records each group still has before it. The window stage commits up to its oldest open window, so it is never at 0 under load.

    Examples:

      flyball topics lag --kafka 127.0.0.1:9092

      flyball topics lag --kafka 127.0.0.1:9092 --by-partition --json
    """
    from flyball.streams.kafka.admin import lags

    with cluster(config, kafka) as (_, reach):
        found = lags(reach)
    if not found and not as_json:
        print(
            f"no group whose name begins with {reach.group('')} has committed anything; start one with `flyball worker`"
        )
    if by_partition:
        for x in found:
            if as_json:
                print_json(
                    {
                        "group": x.group,
                        "topic": x.topic,
                        "partition": x.partition,
                        "committed": x.committed,
                        "end": x.end,
                        "lag": x.lag,
                    }
                )
            else:
                at = "nothing committed" if x.committed is None else f"at {x.committed:,}"
                print(f"{x.group}  {x.topic}/{x.partition}  {at} of {x.end:,}, {x.lag:,} behind")
        return
    for (group, topic), of_topic in groupby(found, lambda x: (x.group, x.topic)):
        lines = list(of_topic)
        worst = max(lines, key=lambda x: x.lag)
        total = sum(x.lag for x in lines)
        if as_json:
            print_json(
                {
                    "group": group,
                    "topic": topic,
                    "partitions": len(lines),
                    "lag": total,
                    "worst_partition": worst.partition,
                    "worst_lag": worst.lag,
                }
            )
        else:
            print(
                f"{group}  {topic}  {total:,} behind in {len(lines)} partitions, the most in {worst.partition}: {worst.lag:,}"
            )
