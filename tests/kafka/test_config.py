"""Address and credentials: said in the settings, refused early, handed to each client in its words."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flyball.app.settings import load, unknown_variables
from flyball.core.errors import ConfigError
from flyball.streams.kafka import require_clients
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.topics import TAKEN_IN, TOPICS

SASL = {"FLYBALL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "FLYBALL_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "FLYBALL_KAFKA_SASL_USERNAME": "flyball", "FLYBALL_KAFKA_SASL_PASSWORD": "a secret"}  # fmt: skip


def test_the_variables_of_the_issue_set_the_group() -> None:
    settings = load(environ={"FLYBALL_KAFKA": "k1:9092,k2:9092", **SASL})
    assert settings.kafka.config() == KafkaConfig(
        "k1:9092,k2:9092", "SASL_SSL", "SCRAM-SHA-512", "flyball", "a secret"
    )


def test_the_command_line_gives_the_address_and_the_variables_the_rest() -> None:
    settings = load(environ={"FLYBALL_KAFKA": "elsewhere:1", **SASL}, kafka="k1:9092")
    assert settings.kafka.bootstrap == "k1:9092"
    assert settings.kafka.sasl_username == "flyball"


def test_the_file_may_give_the_address_alone_or_the_group(tmp_path: Path) -> None:
    path = tmp_path / "flyball.yaml"
    path.write_text("kafka: k1:9092\n")
    assert load(path, environ=SASL).kafka.config().bootstrap == "k1:9092"
    path.write_text("kafka: {bootstrap: k1:9092, prefix: eu., formats: {llm-calls: litellm}}\n")
    kafka = load(path, environ={}).kafka
    assert (kafka.config().topic("state"), kafka.formats) == ("eu.state", {"llm-calls": "litellm"})


def test_a_group_as_json_in_one_variable_is_taken() -> None:
    settings = load(environ={"FLYBALL_KAFKA__PARTITIONS": "16", "FLYBALL_KAFKA_PREFIX": "eu."})
    assert (settings.kafka.partitions, settings.kafka.prefix) == (16, "eu.")


def test_without_an_address_there_is_no_kafka() -> None:
    settings = load(environ={})
    assert settings.kafka.bootstrap == ""
    with pytest.raises(ConfigError, match="no address is given"):
        settings.kafka.config()


WRONG: list[Any] = [
    pytest.param({"FLYBALL_KAFKA": "kafka"}, "kafka (FLYBALL_KAFKA): 'kafka' is no address; write host:port, several between commas", id="no-port"),
    pytest.param({"FLYBALL_KAFKA": "k:99999"}, "'k:99999' is no address", id="port-too-large"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_SECURITY_PROTOCOL": "TLS"}, "kafka.security_protocol (FLYBALL_KAFKA_SECURITY_PROTOCOL): input should be 'PLAINTEXT', 'SSL', 'SASL_PLAINTEXT' or 'SASL_SSL'", id="protocol"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "security_protocol SASL_SSL needs sasl_mechanism; set it", id="sasl-without-mechanism"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_SASL_USERNAME": "u"}, "sasl_username is set, but security_protocol is PLAINTEXT; set it to SASL_SSL or SASL_PLAINTEXT", id="sasl-on-plaintext"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_CA_FILE": "/ca.pem"}, "ca_file is set, but security_protocol is PLAINTEXT", id="ca-on-plaintext"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_SECURITY_PROTOCOL": "SSL", "FLYBALL_KAFKA_CA_FILE": "/no/ca.pem"}, "ca_file '/no/ca.pem' is not there; name a PEM file", id="ca-missing"),
    pytest.param({"FLYBALL_KAFKA": "k:1", "FLYBALL_KAFKA_PREFIX": "a/b"}, "prefix 'a/b' cannot stand in a topic's name", id="prefix"),
    pytest.param({"FLYBALL_KAFKA_FORMATS": '{"llm_calls": "litellm"}'}, "no event comes in by topic 'llm_calls'; did you mean 'llm-calls'?", id="format-of-unknown-topic"),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "said"), WRONG)
def test_what_cannot_work_is_one_message_at_the_start(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        load(environ=environ)
    assert said in str(e.value)
    assert str(e.value).startswith("one setting is wrong:")


def test_every_mistake_stands_in_the_one_message() -> None:
    with pytest.raises(ConfigError) as e:
        KafkaConfig("kafka", "SASL_SSL", prefix="?")
    for said in ("'kafka'", "needs sasl_mechanism", "needs sasl_username", "needs sasl_password", "prefix"):
        assert said in str(e.value)


def test_a_password_is_never_shown() -> None:
    config = KafkaConfig("k:1", "SASL_SSL", "PLAIN", "u", "a secret")
    assert "a secret" not in repr(config)
    with pytest.raises(ConfigError) as e:
        load(environ={"FLYBALL_KAFKA": "bad", **SASL, "FLYBALL_KAFKA_SASL_MECHANISM": "a secret"})
    assert "a secret" not in str(e.value)
    assert "a secret" not in repr(load(environ={"FLYBALL_KAFKA": "k:1", **SASL}))


def test_a_misspelt_variable_is_told() -> None:
    assert unknown_variables({"FLYBALL_KAFKA": "k:1", **SASL}) == []
    (said,) = unknown_variables({"FLYBALL_KAFKA_CAFILE": "x"})
    assert "did you mean 'FLYBALL_KAFKA_CA_FILE'?" in said


def test_what_kubernetes_sets_for_a_service_called_flyball_kafka_is_no_setting() -> None:
    links = {
        "FLYBALL_KAFKA_PORT": "tcp://10.0.0.1:9092",
        "FLYBALL_KAFKA_SERVICE_HOST": "10.0.0.1",
        "FLYBALL_KAFKA_PORT_9092_TCP": "tcp://10.0.0.1:9092",
    }
    assert load(environ=links).kafka.bootstrap == ""
    assert unknown_variables(links) == []


def test_each_client_is_told_in_its_words() -> None:
    config = KafkaConfig("k1:9092, k2:9092", "SASL_SSL", "PLAIN", "u", "p")
    for found in (config.for_aiokafka(), config.for_kafka_python()):
        assert found["bootstrap_servers"] == ["k1:9092", "k2:9092"]
        assert found["security_protocol"] == "SASL_SSL"
        assert (found["sasl_mechanism"], found["sasl_plain_username"]) == ("PLAIN", "u")
        assert found["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    confluent = config.for_confluent()
    assert confluent["bootstrap.servers"] == "k1:9092,k2:9092"
    assert (confluent["sasl.mechanism"], confluent["sasl.password"]) == ("PLAIN", "p")
    faust = config.for_faust()
    assert faust["broker"] == ["kafka://k1:9092", "kafka://k2:9092"]
    assert (faust["broker_credentials"].username, faust["broker_credentials"].protocol.value) == (
        "u",
        "SASL_SSL",
    )
    assert KafkaConfig("k:1").for_faust()["broker_credentials"] is None


def test_a_file_that_holds_no_certificates_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("nothing")
    with pytest.raises(ConfigError, match=r"ca\.pem' cannot be read as certificates"):
        KafkaConfig("k:1", "SSL", ca_file=str(path)).for_aiokafka()


def test_groups_follow_the_prefix() -> None:
    assert KafkaConfig("k:1").group("windows") == "flyball-windows"
    assert KafkaConfig("k:1", prefix="eu.flyball.").group("control") == "eu.flyball-control"
    assert KafkaConfig("k:1", prefix="").group("control") == "flyball-control"


def test_topics_are_those_of_the_design_and_say_how_they_are_kept() -> None:
    assert {"llm-calls", "agent-steps", "gpu-samples", "changes"} == set(TAKEN_IN)
    compacted = {t.name for t in TOPICS.values() if t.settings()["cleanup.policy"] == "compact"}
    assert compacted == {"directives", "state"}
    assert all("retention.ms" in t.settings() for t in TOPICS.values() if t.name not in compacted)


def test_the_command_line_loads_no_kafka_client() -> None:
    code = (
        "import sys, flyball.app.cli, flyball.app.settings, flyball.streams.kafka.config, flyball.streams.kafka.topics;"
        "print([m for m in ('faust', 'aiokafka', 'kafka', 'confluent_kafka') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_extra_is_asked_for_by_name_where_it_is_missing() -> None:
    require_clients()  # the development environment has them all
    with pytest.raises(
        ConfigError, match=r"not installed \(no-such-client\); pip install 'flyball\[kafka\]'"
    ):
        require_clients(["msgspec", "no-such-client"])
