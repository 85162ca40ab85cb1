"""The commands around Kafka as a person types them, against a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from typer.testing import CliRunner

from flyball.app.cli import app
from flyball.core.errors import FlyballError
from flyball.streams.kafka import admin, dead_letters
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.dead_letters import KafkaLetter
from flyball.streams.kafka.topics import TOPICS
from tests.processes import free_port
from tests.servers.kafka_broker import Cluster


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass
class Shell:
    """A shell with FLYBALL_KAFKA set. Commands run in this process, which saves their start; `process` starts one."""

    config: KafkaConfig

    def __call__(self, *words: str, **variables: str) -> Said:
        done = CliRunner().invoke(app, words, env=self._env(variables))
        if isinstance(done.exception, FlyballError):
            return Said(2, done.stdout, str(done.exception))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Said(done.exit_code, done.stdout, done.stderr)

    def process(self, *words: str, **variables: str) -> Said:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FLYBALL_")} | self._env(variables)
        command = [sys.executable, "-m", "flyball.app", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        return Said(done.returncode, done.stdout, done.stderr)

    def _env(self, variables: dict[str, str]) -> dict[str, str]:
        return {
            "FLYBALL_KAFKA": self.config.bootstrap,
            "FLYBALL_KAFKA_PREFIX": self.config.prefix,
            **variables,
        }


@pytest.fixture
def flyball(kafka_config: KafkaConfig) -> Shell:
    return Shell(kafka_config)


def test_topics_are_made_listed_and_made_again_without_change(flyball: Shell) -> None:
    made = flyball("topics", "create", "--partitions", "3")
    assert (made.code, made.err) == (0, "")
    assert len(made.lines) == len(TOPICS)
    assert f"made       {flyball.config.topic('llm-calls')}: 3 partitions, kept for 7 days" in made.lines
    again = flyball("topics", "create", "--partitions", "3")
    assert (again.code, {line.split("  ")[0] for line in again.lines}) == (0, {"as wanted"})
    listed = [json.loads(x) for x in flyball("topics", "list", "--json", FLYBALL_KAFKA_PARTITIONS="3").lines]
    assert [x["differs"] for x in listed] == [[]] * len(TOPICS)
    assert "no group" in flyball("topics", "lag").out


def test_a_wish_for_more_partitions_is_told_not_done_and_ends_with_1(flyball: Shell) -> None:
    flyball("topics", "create", "--partitions", "1")
    told = flyball("topics", "create", "--partitions", "2")
    assert told.code == 1
    assert (
        f"differs    {flyball.config.topic('agent-steps')}: topic {flyball.config.topic('agent-steps')} has 1 partition, 2 are wanted"
        in told.lines
    )
    assert told.lines[-1] == "bring them to what is wanted with: flyball topics create --mend"
    assert flyball("topics", "create", "--partitions", "2", "--mend").code == 0
    assert flyball("topics", "create", "--partitions", "2").code == 0


WRONG = {
    "address": (
        ("topics", "create"),
        "refuses the connection: no broker listens there; start it, or correct the address",
        3,
    ),
    "password": (
        ("topics", "lag"),
        "refuses user 'flyball' with PLAIN; correct FLYBALL_KAFKA_SASL_USERNAME",
        3,
    ),
    "settings": (
        ("dead-letters", "show", "0/1"),
        "security_protocol SASL_SSL needs sasl_mechanism; set it",
        2,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_message_and_no_stack_trace(secured_kafka: Cluster, wrong: str) -> None:
    variables = {
        "address": {"FLYBALL_KAFKA": f"127.0.0.1:{free_port()}"},
        "password": {"FLYBALL_KAFKA": secured_kafka.address("SASL_PLAINTEXT"), "FLYBALL_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
                     "FLYBALL_KAFKA_SASL_MECHANISM": "PLAIN", "FLYBALL_KAFKA_SASL_USERNAME": "flyball", "FLYBALL_KAFKA_SASL_PASSWORD": "wrong-one"},
        "settings": {"FLYBALL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"},
    }[wrong]  # fmt: skip
    command, text, code = WRONG[wrong]
    said = Shell(secured_kafka.config()).process(*command, **variables)
    assert (said.code, said.out) == (code, "")
    assert text in said.err
    assert "Traceback" not in said.err
    assert "wrong-one" not in said.err
    assert len([line for line in said.err.splitlines() if not line.startswith("  ")]) == 1


def test_commands_work_over_tls_with_a_password(secured_kafka: Cluster) -> None:
    config = secured_kafka.config("SASL_SSL", "SCRAM-SHA-512", prefix="over-tls.")
    variables = {
        "FLYBALL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "FLYBALL_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512", "FLYBALL_KAFKA_CA_FILE": config.ca_file,
        "FLYBALL_KAFKA_SASL_USERNAME": config.sasl_username, "FLYBALL_KAFKA_SASL_PASSWORD": config.sasl_password,
    }  # fmt: skip
    made = Shell(config)("topics", "create", **variables)
    assert (made.code, made.err) == (0, "")
    assert Shell(config)("dead-letters", "list", "--kafka", config.bootstrap, **variables).code == 0


# --- dead letters --------------------------------------------------------------------------------------------------


def letter(config: KafkaConfig, **changes: Any) -> KafkaLetter:
    given: dict[str, Any] = {
        "topic": config.topic("llm-calls"), "partition": 1, "offset": 7, "reason": "json", "detail": "not JSON; write one object a line",
        "at": 1_700_000_000.0, "size": 5, "body": b'{"a":', "headers": (("content-type", b"application/x-ndjson"),),
    }  # fmt: skip
    return KafkaLetter(**(given | changes))


def put_aside(config: KafkaConfig, *letters: KafkaLetter) -> None:
    async def work() -> None:
        async with AIOKafkaProducer(**config.for_aiokafka()) as producer:
            for x in letters:
                await producer.send_and_wait(
                    config.topic("dead-letters"), x.body, key=x.key, headers=dead_letters.to_headers(x)
                )

    admin.create_topics(config, admin.wanted(2, ["llm-calls", "dead-letters"]))
    asyncio.run(work())


def records(config: KafkaConfig, name: str, n: int) -> list[tuple[int, bytes | None, dict[str, bytes]]]:
    async def work() -> list[tuple[int, bytes | None, dict[str, bytes]]]:
        async with AIOKafkaConsumer(
            config.topic(name), **config.for_aiokafka(), auto_offset_reset="earliest"
        ) as consumer:
            found = [await asyncio.wait_for(consumer.getone(), 20) for _ in range(n)]
            return [(r.partition, r.value, dict(r.headers)) for r in found]

    return asyncio.run(work())


def test_a_letter_is_the_same_after_its_way_through_kafka(kafka_config: KafkaConfig) -> None:
    sent = [letter(kafka_config, at=1.5, index=3), letter(kafka_config, at=0.5, body=None, reason="größe")]
    put_aside(kafka_config, *sent)
    found = dead_letters.newest(kafka_config, 10)
    assert [x.id for x in found] == ["0/0", "0/1"]
    assert [replace(x, id="") for x in found] == sent


def test_letters_are_listed_shown_and_sent_once_more_where_they_came_from(flyball: Shell) -> None:
    config = flyball.config
    put_aside(
        config,
        letter(config),
        letter(config, reason="type", body=b"{}", size=2, headers=(), at=1_700_000_001.0),
    )
    listed = flyball("dead-letters", "list", "--kafka", config.bootstrap)
    assert listed.code == 0, listed.err
    assert listed.lines[0].startswith(f"0/1  2023-11-14 22:13:21  {config.topic('llm-calls')}/1 at 7: type:")
    shown = flyball("dead-letters", "show", "0/0")
    assert shown.lines[1:] == [
        "json: not JSON; write one object a line",
        "content-type: application/x-ndjson",
        '{"a":',
    ]
    assert flyball("dead-letters", "replay", "0/0").out == "1 sent once more\n"
    assert records(config, "llm-calls", 1) == [
        (1, b'{"a":', {"content-type": b"application/x-ndjson", "flyball-replayed": b"0/0"})
    ]
    after = [
        json.loads(x) for x in flyball("dead-letters", "list", "--kafka", config.bootstrap, "--json").lines
    ]
    assert [(x["id"], x["replayed"]) for x in after] == [("0/1", False), ("0/0", True)]


def test_what_was_sent_once_more_is_left_out_until_asked_for_again(flyball: Shell) -> None:
    put_aside(flyball.config, letter(flyball.config), letter(flyball.config, body=b"x"))
    assert flyball("dead-letters", "replay", "--reason", "json").out == "2 sent once more\n"
    assert "0 sent once more; 2 left out" in flyball("dead-letters", "replay", "--reason", "json").out
    assert "1 sent once more" in flyball("dead-letters", "replay", "0/0", "--again").out
    assert len(records(flyball.config, "llm-calls", 3)) == 3


def test_what_cannot_be_sent_once_more_is_said_and_nothing_is_sent(flyball: Shell) -> None:
    put_aside(
        flyball.config,
        letter(flyball.config),
        letter(flyball.config, body=None),
        letter(flyball.config, topic="payments"),
    )
    for words, said in (
        (("0/0", "0/1"), "the bytes of 0/1 were not kept"),
        (("0/0", "0/2"), "0/2 came by topic 'payments', which is none of"),
        (("0/99",), "there is no dead letter 0/99; `flyball dead-letters list --kafka …` lists them"),
        (("nine",), "'nine' is no id of a dead letter; write PARTITION/OFFSET"),
        ((), "give the ids of letters, or --reason"),
    ):
        answer = flyball("dead-letters", "replay", *words)
        assert (answer.code, answer.out) == (2, "")
        assert said in answer.err
    with admin.connected(flyball.config) as client:
        seen = client.describe_topics([flyball.config.topic("llm-calls")])
        assert len(seen[0]["partitions"]) == 2
    assert dead_letters.newest(flyball.config, 10)[0].replayed is False


def test_letters_of_a_missing_topic_are_asked_for_with_the_command_to_make_it(flyball: Shell) -> None:
    said = flyball("dead-letters", "show", "0/0")
    assert said.code == 2
    assert (
        f"topic {flyball.config.topic('dead-letters')} is missing; say `flyball topics create --kafka"
        in said.err
    )


def test_the_doctor_looks_at_the_cluster_when_one_is_set(flyball: Shell) -> None:
    before = {x["check"]: x for x in map(json.loads, flyball("doctor", "--json").lines)}
    assert before["kafka topics"]["level"] == "bad"
    assert "flyball topics create" in before["kafka topics"]["mend"]
    flyball("topics", "create")
    after = {x["check"]: x for x in map(json.loads, flyball("doctor", "--json").lines)}
    assert after["kafka"]["level"] == "ok"
    assert "version 4" in after["kafka"]["what"]
    assert not [c for c, x in after.items() if c.startswith("kafka") and x["level"] == "bad"]


def test_the_doctor_says_why_the_cluster_cannot_be_reached(flyball: Shell) -> None:
    said = flyball("doctor", "--json", FLYBALL_KAFKA=f"127.0.0.1:{free_port()}")
    found = {x["check"]: x for x in map(json.loads, said.lines)}
    assert (said.code, found["kafka address"]["level"]) == (1, "bad")
    assert "no broker listens there" in found["kafka address"]["what"]


# --- docs/kafka.md -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "kafka.md").read_text()


def test_the_commands_of_the_page_do_what_it_says(flyball: Shell) -> None:
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M))
    ends = ("flyball topics ", "flyball dead-letters ", "flyball doctor")
    commands = [line for line in blocks.splitlines() if line.startswith(ends)]
    assert len(commands) >= 9
    for command in commands:
        if command.startswith("flyball dead-letters list"):
            # From partition 1 of a topic that the page has made with 8 by now.
            put_aside(flyball.config, *(letter(flyball.config) for _ in range(18)))
        words = command.replace("kafka-1:9092", flyball.config.bootstrap).split()[1:]
        said = flyball(*words)
        assert said.code == 0, (command, said)
        assert said.out or "--json" in words


def test_the_table_of_topics_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `flyball\.([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
    assert rows == [
        (t.name, str(t.partitions or "`kafka.partitions`"), admin.kept(t).removeprefix("kept for "), t.what)
        for t in TOPICS.values()
    ]
