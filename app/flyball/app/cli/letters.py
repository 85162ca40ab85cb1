"""`flyball dead-letters …`: what could not be taken, and sending it once more."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flyball.app.cli._common import (
    DEFAULT_URL,
    AsJson,
    Config,
    TokenOption,
    Url,
    get,
    print_json,
)
from flyball.app.cli.topics import Kafka, cluster
from flyball.core.errors import ConfigError

if TYPE_CHECKING:
    from flyball.streams.kafka.dead_letters import KafkaLetter

_Ids = Annotated[list[str], typer.Argument(help="PARTITION/OFFSET, as `flyball dead-letters list --kafka …` shows it.", metavar="ID...")]  # fmt: skip


def add_to(app: typer.Typer) -> None:
    letters = typer.Typer(help="What could not be taken.", no_args_is_help=True)
    letters.command("list")(list_)
    letters.command("show")(show)
    letters.command("replay")(replay)
    app.add_typer(letters, name="dead-letters")


def list_(
    url: Url = DEFAULT_URL,
    token: TokenOption = "",
    kafka: Annotated[
        str | None,
        typer.Option(
            "--kafka",
            metavar="ADDRESS",
            help="Read the topic of this cluster instead of asking a running Flyball.",
            show_default="",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """What could not be taken, newest first, with its reason. A running Flyball wants the admin role.

    Examples:

      flyball dead-letters list --limit 1 --json

      flyball dead-letters list --kafka 127.0.0.1:9092
    """
    from flyball.app.text import clock

    if kafka is not None:
        from flyball.streams.kafka.dead_letters import newest

        with cluster(config, kafka) as (_, reach):
            found = newest(reach, limit)
        for letter in found:
            if as_json:
                print_json(_as_json(letter))
            else:
                again = "  (sent once more)" if letter.replayed else ""
                print(
                    f"{letter.id}  {clock(letter.at)}  {_place(letter)}: {letter.reason}: {letter.detail}{again}"
                )
                print(f"    {letter.size} bytes: {_shown(letter.body, 100)}")
        return
    for told in get(url, token, "/v1/dead-letters", limit=limit):
        if as_json:
            print_json(told)
            continue
        print(
            f"{clock(told['at'])}  {told['format']} from {told['sender']}: {told['reason']}: {told['detail']}"
        )
        print(
            f"    {told['size']} bytes: {_shown(base64.b64decode(told['body']) if told['body'] else None, 100)}"
        )


def show(ids: _Ids, kafka: Kafka = None, config: Config = None, as_json: AsJson = False) -> None:
    """Letters of the Kafka topic in full: where each stood, why it was put aside, its headers and bytes.

    Examples:

      flyball dead-letters show 0/17 --kafka 127.0.0.1:9092

      flyball dead-letters show 0/17 0/18 --kafka 127.0.0.1:9092 --json
    """
    from flyball.app.text import clock
    from flyball.streams.kafka.dead_letters import fetch

    with cluster(config, kafka) as (_, reach):
        found = fetch(reach, ids)
    for letter in found:
        if as_json:
            print_json(_as_json(letter))
            continue
        print(f"{letter.id}  {clock(letter.at)}  {_place(letter)}")
        print(f"{letter.reason}: {letter.detail}")
        for name, value in letter.headers:
            print(f"{name}: {value.decode('utf-8', 'replace')}")
        print(_shown(letter.body, None))


def replay(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            help="PARTITION/OFFSET, as `flyball dead-letters list --kafka …` shows it.", metavar="[ID...]"
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="All of this reason instead of single ones.")] = "",
    limit: Annotated[
        int, typer.Option(min=1, max=100_000, help="With --reason: of so many newest letters.")
    ] = 1000,
    again: Annotated[
        bool, typer.Option("--again", help="Also those that were sent once more already.")
    ] = False,
    kafka: Kafka = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Sends letters of the Kafka topic once more, to the partitions they came from. Events that had arrived all the same are not counted twice.

    Examples:

      flyball dead-letters replay 0/17 --kafka 127.0.0.1:9092

      flyball dead-letters replay --reason json --kafka 127.0.0.1:9092
    """
    from flyball.streams.kafka import dead_letters

    if bool(ids) == bool(reason):
        raise ConfigError("give the ids of letters, or --reason for all of one reason")
    with cluster(config, kafka) as (_, reach):
        newest = dead_letters.newest(reach, limit if reason else 1000)
        sent_before = {x.id for x in newest if x.replayed}
        found = (
            [x for x in newest if x.reason == reason and x.body is not None]
            if reason
            else dead_letters.fetch(reach, ids or [])
        )
        chosen = [x for x in found if again or x.id not in sent_before]
        sent = dead_letters.replay(reach, chosen)
    left = len(found) - len(chosen)
    if as_json:
        print_json({"sent": sent, "left_out": left})
        return
    print(
        f"{sent} sent once more"
        + (f"; {left} left out, they were before: --again sends them too" if left else "")
    )


def _place(letter: KafkaLetter) -> str:
    if not letter.topic:
        return "over HTTP"
    line = f" line {letter.index + 1}" if letter.index >= 0 else ""
    return f"{letter.topic}/{letter.partition} at {letter.offset}{line}"


def _shown(body: bytes | None, most: int | None) -> str:
    return "(bytes not kept)" if body is None else body.decode("utf-8", "replace")[:most]


def _as_json(letter: KafkaLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "at": letter.at,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "index": letter.index,
        "reason": letter.reason,
        "detail": letter.detail,
        "size": letter.size,
        "headers": {name: value.decode("utf-8", "replace") for name, value in letter.headers},
        "body": base64.b64encode(letter.body).decode() if letter.body is not None else None,
        "replayed": letter.replayed,
    }
