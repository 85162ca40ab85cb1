"""TLS and SASL against real listeners, with every client; what is wrong is told in words."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, get_args

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Consumer

from flyball.core.errors import ConfigError
from flyball.streams.kafka import admin
from flyball.streams.kafka.config import KafkaConfig, SaslMechanism
from flyball.streams.kafka.reach import why_unreachable
from tests.servers.kafka_broker import GUEST, Cluster
from tests.servers.kafka_ways import new_prefix

LISTENERS: list[Any] = [
    pytest.param("SSL", "PLAIN", id="SSL"),
    *(
        pytest.param(protocol, mechanism, id=f"{protocol}-{mechanism}")
        for protocol in ("SASL_PLAINTEXT", "SASL_SSL")
        for mechanism in get_args(SaslMechanism)
    ),
]


@pytest.mark.parametrize(("protocol", "mechanism"), LISTENERS)
def test_every_client_gets_through_every_listener(
    secured_kafka: Cluster, protocol: Any, mechanism: SaslMechanism
) -> None:
    config = secured_kafka.config(protocol, mechanism, prefix=new_prefix())
    topics = admin.wanted(1, ["llm-calls"])
    admin.create_topics(config, topics)  # kafka-python, and librdkafka before it
    assert admin.check_cluster(config, topics) == []
    assert asyncio.run(_there_and_back(config)) == b"{}"  # aiokafka
    consumer = Consumer(
        {**config.for_confluent(), "group.id": config.group("x"), "auto.offset.reset": "earliest"}
    )
    try:
        consumer.subscribe([config.topic("llm-calls")])
        message = consumer.poll(20)
        assert message is not None
        assert message.value() == b"{}"
    finally:
        consumer.close()


async def _there_and_back(config: KafkaConfig) -> bytes:
    topic = config.topic("llm-calls")
    async with (
        AIOKafkaProducer(**config.for_aiokafka(), acks="all", enable_idempotence=True) as producer,
        AIOKafkaConsumer(topic, **config.for_aiokafka(), auto_offset_reset="earliest") as consumer,
    ):
        await producer.send_and_wait(topic, b"{}")
        record = await asyncio.wait_for(consumer.getone(), 20)
        value: bytes = record.value
        return value


@pytest.mark.parametrize(
    ("protocol", "mechanism"),
    [p for p in LISTENERS if p.id in ("SSL", "SASL_PLAINTEXT-PLAIN", "SASL_SSL-SCRAM-SHA-512")],
)
def test_fausts_own_consumer_gets_through_too(
    secured_kafka: Cluster, protocol: Any, mechanism: SaslMechanism
) -> None:
    """Faust makes its clients itself, from the credentials it is given."""
    import faust

    config = secured_kafka.config(protocol, mechanism, prefix=new_prefix())
    admin.create_topics(config, admin.wanted(1, ["changes"]))
    app = faust.App(
        config.group("faust"),
        **config.for_faust(),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
    )
    topic = app.topic(config.topic("changes"), value_serializer="raw")

    async def send() -> int:
        await app.producer.start()
        try:
            sent = await (await topic.send(value=b"{}"))
            return int(sent.offset)
        finally:
            await app.producer.stop()

    assert asyncio.run(send()) == 0


def test_a_wrong_password_names_the_user_and_the_variables(secured_kafka: Cluster) -> None:
    for protocol, mechanism in (("SASL_PLAINTEXT", "PLAIN"), ("SASL_SSL", "SCRAM-SHA-512")):
        config = secured_kafka.config(protocol, mechanism, sasl_password="wrong-one")  # type: ignore[arg-type]
        (found,) = admin.check_cluster(config, admin.wanted(1))
        assert f"refuses user 'flyball' with {mechanism}" in found.what
        assert "FLYBALL_KAFKA_SASL_PASSWORD" in found.mend
        assert "wrong-one" not in str(found)
        with pytest.raises(ConfigError, match="refuses user 'flyball'"):
            admin.require_cluster(config, admin.wanted(1))


def test_a_user_who_may_do_nothing_is_told_which_rights_to_ask_for(secured_kafka: Cluster) -> None:
    config = secured_kafka.config("SASL_PLAINTEXT", "PLAIN", prefix=new_prefix())
    admin.create_topics(config, admin.wanted(1, ["changes"]))
    (found,) = admin.check_cluster(replace(config, sasl_username=GUEST), admin.wanted(1, ["changes"]))
    assert (found.check, found.level) == ("rights", "bad")
    assert (
        found.what
        == f"the cluster does not allow user 'guest' what is asked (Describe on {config.topic('changes')})"
    )
    assert (
        f"grant Describe, DescribeConfigs, Read and Write on topics and groups {config.prefix}*" in found.mend
    )


def spoilt(case: str, cluster: Cluster) -> KafkaConfig:
    match case:
        case "plain client, TLS listener":
            return cluster.config("PLAINTEXT", bootstrap=cluster.address("SSL"))
        case "plain client, SASL listener":
            return cluster.config("PLAINTEXT", bootstrap=cluster.address("SASL_PLAINTEXT"))
        case "TLS client, plain listener":
            return cluster.config("SSL", bootstrap=cluster.address("PLAINTEXT"))
        case "SASL client, plain listener":
            return cluster.config("SASL_PLAINTEXT", bootstrap=cluster.address("PLAINTEXT"))
        case "unknown authority":
            return cluster.config("SASL_SSL", "SCRAM-SHA-256", ca_file="")
        case _:
            return cluster.config("PLAINTEXT", bootstrap=f"127.0.0.1:{cluster.nodes[0].ports['CONTROLLER']}")


SPOILT = {
    "plain client, TLS listener": "closes the connection: it wants another protocol than PLAINTEXT; correct FLYBALL_KAFKA_SECURITY_PROTOCOL",
    "plain client, SASL listener": "closes the connection: it wants another protocol than PLAINTEXT; correct FLYBALL_KAFKA_SECURITY_PROTOCOL",
    "TLS client, plain listener": "does not speak TLS, but security_protocol is SSL; correct FLYBALL_KAFKA_SECURITY_PROTOCOL",
    "SASL client, plain listener": "asks for no password, but security_protocol is SASL_PLAINTEXT; correct FLYBALL_KAFKA_SECURITY_PROTOCOL",
    "unknown authority": "shows a certificate that the system's authorities did not sign or that is for another name; name its authority in FLYBALL_KAFKA_CA_FILE",
    "controller": "is no broker, perhaps a controller; give a broker's address",
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_each_way_of_not_getting_through_has_its_own_words(secured_kafka: Cluster, case: str) -> None:
    assert SPOILT[case] in why_unreachable(spoilt(case, secured_kafka), timeout_s=2.0)


def test_a_broker_that_hangs_is_told_as_such(secured_kafka: Cluster) -> None:
    node = secured_kafka.nodes[0]
    node.pause()
    try:
        said = why_unreachable(secured_kafka.config(), timeout_s=1.0)
    finally:
        node.resume()
    assert "does not answer within 1 s" in said
