"""Whether a cluster can be reached, and if not, why: in words that say what to set.

librdkafka tells the reasons apart (no such host, refused, certificate, password); kafka-python and aiokafka make one timeout of them all.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from flyball.core.errors import FlyballError
from flyball.streams.kafka import require_clients
from flyball.streams.kafka.config import KafkaConfig

REACH_S: Final = 5.0
"""How long to wait for a cluster that does not answer."""


class BrokerUnreachable(FlyballError):
    """No broker can be spoken to. The text says why and what would be right."""


def why_unreachable(config: KafkaConfig, timeout_s: float = REACH_S) -> str:
    """Empty when the cluster answers; else one sentence: what is wrong; what to do.

    What time does not mend (name, certificate, password) is told at once, a refused connection after `timeout_s`.

    Raises: ConfigError when the clients are not installed, or the file of authorities cannot be read.
    """
    require_clients()
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    config.ssl_context()  # says which file cannot be read
    errors: list[Any] = []
    quiet = logging.Logger("flyball.kafka.reach", logging.CRITICAL + 1)
    settings = {
        **config.for_confluent(),
        "error_cb": errors.append,
        "socket.connection.setup.timeout.ms": int(timeout_s * 1000) + 1000,
    }
    client = AdminClient(settings, logger=quiet)
    end = time.monotonic() + timeout_s
    last = ""
    while time.monotonic() < end:
        client.poll(0.05)
        try:
            client.list_topics(timeout=0.3)
            return ""
        except KafkaException as e:
            last = e.args[0].name()
        client.poll(0)
        seen = {e.name() for e in errors}
        if "_ALL_BROKERS_DOWN" in seen and seen & {"_AUTHENTICATION", "_SSL", "_RESOLVE"}:
            break
    return _reason(config, {e.name(): e.str() for e in reversed(errors)}, last, timeout_s)


def require_reachable(config: KafkaConfig, timeout_s: float = REACH_S) -> None:
    """Raises: BrokerUnreachable."""
    why = why_unreachable(config, timeout_s)
    if why:
        raise BrokerUnreachable(why)


def _reason(config: KafkaConfig, errors: dict[str, str], last: str, timeout_s: float) -> str:
    """`errors`: librdkafka's name of an error → its first text."""
    where = f"Kafka at {','.join(config.servers)}"
    if text := errors.get("_AUTHENTICATION"):
        return _login(config, where, text)
    if text := errors.get("_SSL"):
        if "certificate verify failed" in text:
            trusted = f"ca_file {config.ca_file}" if config.ca_file else "the system's authorities"
            return f"{where} shows a certificate that {trusted} did not sign or that is for another name; name its authority in FLYBALL_KAFKA_CA_FILE"
        return f"{where}: TLS fails ({_bare(text)}); correct FLYBALL_KAFKA_SECURITY_PROTOCOL or FLYBALL_KAFKA_CA_FILE"
    if "_RESOLVE" in errors:
        return f"{where}: no host of this name is known; correct the address (--kafka, FLYBALL_KAFKA)"
    text = errors.get("_TRANSPORT", "")
    if "PLAINTEXT broker listener" in text or "unexpected message" in text:
        return f"{where} does not speak TLS, but security_protocol is {config.security_protocol}; correct FLYBALL_KAFKA_SECURITY_PROTOCOL, or give the address of the TLS listener"
    if "refused" in text:
        return f"{where} refuses the connection: no broker listens there; start it, or correct the address (--kafka, FLYBALL_KAFKA)"
    if last == "_UNSUPPORTED_FEATURE":
        return f"{where} is no broker, perhaps a controller; give a broker's address (--kafka, FLYBALL_KAFKA)"
    if "_ALL_BROKERS_DOWN" in errors and not text:
        return f"{where} closes the connection: it wants another protocol than {config.security_protocol}; correct FLYBALL_KAFKA_SECURITY_PROTOCOL, or give the address of another listener"
    detail = f" ({_bare(text)})" if text else ""
    return f"{where} does not answer within {timeout_s:g} s{detail}; see whether it runs, and correct the address if not (--kafka, FLYBALL_KAFKA)"


def _login(config: KafkaConfig, where: str, text: str) -> str:
    if "not valid in current SASL state" in text:
        return f"{where} asks for no password, but security_protocol is {config.security_protocol}; correct FLYBALL_KAFKA_SECURITY_PROTOCOL, or give the address of the SASL listener"
    if "mechanism" in text and "supported mechanisms" in text:
        known = text.partition("supported mechanisms:")[2].partition("(after")[0].strip()
        return f"{where} does not take {config.sasl_mechanism}; set FLYBALL_KAFKA_SASL_MECHANISM to one of: {known}"
    return f"{where} refuses user {config.sasl_username!r} with {config.sasl_mechanism}; correct FLYBALL_KAFKA_SASL_USERNAME, FLYBALL_KAFKA_SASL_PASSWORD or FLYBALL_KAFKA_SASL_MECHANISM"


def _bare(text: str) -> str:
    """librdkafka's text without the broker before and the state after it."""
    return text.partition("/bootstrap: ")[2].partition(" (after ")[0] or text
