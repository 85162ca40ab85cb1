"""How to reach a Kafka cluster, said once and handed to each client in its own words."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from flyball.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from faust.types.auth import CredentialsT

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_TOPIC_PART: Final = re.compile(r"[A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True, slots=True)
class KafkaConfig:
    """Address and credentials of a cluster. What cannot work is refused here, not at the first connection.

    Args:
        bootstrap: `host:port`, several between commas; any node of the cluster will do.
        ca_file: PEM file with the authorities to trust; empty means those of the system. Only for SSL.
        prefix: what every topic name begins with, so that several Flyballs can share a cluster; groups and
            client names take it over with a dash in place of the last dot.
        groups: what the names of consumer groups begin with; empty means as `prefix` says. Another one reads the topics
            from their start, and has snapshots of its own.

    Raises: ConfigError, one for all that is wrong.

    >>> KafkaConfig("kafka-1:9092,kafka-2:9092").topic("llm-calls")
    'flyball.llm-calls'
    >>> KafkaConfig("kafka", sasl_mechanism="PLAIN")
    Traceback (most recent call last):
        ...
    flyball.core.errors.ConfigError: kafka: 'kafka' is no address; write host:port, several between commas; \
sasl_mechanism is set, but security_protocol is PLAINTEXT; set it to SASL_SSL or SASL_PLAINTEXT
    """

    bootstrap: str
    security_protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism | Literal[""] = ""
    sasl_username: str = ""
    sasl_password: str = field(default="", repr=False)
    ca_file: str = ""
    prefix: str = "flyball."
    client_id: str = "flyball"
    groups: str = ""

    def __post_init__(self) -> None:
        wrong = [*self._wrong_addresses(), *self._wrong_security(), *self._wrong_names()]
        if wrong:
            raise ConfigError("; ".join(wrong), where="kafka")

    @property
    def servers(self) -> list[str]:
        return [part.strip() for part in self.bootstrap.split(",") if part.strip()]

    @property
    def encrypted(self) -> bool:
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def authenticated(self) -> bool:
        return self.security_protocol.startswith("SASL")

    def topic(self, name: str) -> str:
        """Full name of one of our topics."""
        return f"{self.prefix}{name}"

    def group(self, role: str) -> str:
        """Name of the consumer group of a role: `flyball-windows`."""
        return f"{self.groups or self.prefix.rstrip('.-_') or 'flyball'}-{role}"

    def for_aiokafka(self) -> dict[str, Any]:
        """Keyword arguments of `AIOKafkaConsumer` and `AIOKafkaProducer`."""
        return self._for_python()

    def for_kafka_python(self) -> dict[str, Any]:
        """Keyword arguments of kafka-python's admin client, consumer and producer."""
        return self._for_python()

    def for_confluent(self) -> dict[str, Any]:
        """Configuration of confluent-kafka's clients."""
        found: dict[str, Any] = {
            "bootstrap.servers": ",".join(self.servers),
            "client.id": self.client_id,
            "security.protocol": self.security_protocol,
        }
        if self.encrypted:
            found["ssl.ca.location"] = self.ca_file or ssl.get_default_verify_paths().cafile or "probe"
        if self.authenticated:
            found["sasl.mechanism"] = self.sasl_mechanism
            found["sasl.username"] = self.sasl_username
            found["sasl.password"] = self.sasl_password
        return found

    def for_faust(self) -> dict[str, Any]:
        """Keyword arguments of `faust.App`: `broker` and `broker_credentials`."""
        return {
            "broker": [f"kafka://{server}" for server in self.servers],
            "broker_credentials": self._credentials(),
        }

    def ssl_context(self) -> ssl.SSLContext | None:
        """None where the connection is not encrypted. Host names are checked."""
        if not self.encrypted:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file or None)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(
                f"ca_file {self.ca_file!r} cannot be read as certificates ({e.strerror or e}); name a PEM file",
                where="kafka",
            ) from e

    def _for_python(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bootstrap_servers": self.servers,
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
        }
        if self.encrypted:
            found["ssl_context"] = self.ssl_context()
        if self.authenticated:
            found["sasl_mechanism"] = self.sasl_mechanism
            found["sasl_plain_username"] = self.sasl_username
            found["sasl_plain_password"] = self.sasl_password
        return found

    def _credentials(self) -> CredentialsT | None:
        from faust.auth import SASLCredentials, SSLCredentials

        context = self.ssl_context()
        if self.authenticated:
            credentials: CredentialsT = SASLCredentials(
                mechanism=self.sasl_mechanism,
                username=self.sasl_username,
                password=self.sasl_password,
                ssl_context=context,
            )
            return credentials
        return SSLCredentials(context=context) if context is not None else None

    def _wrong_addresses(self) -> list[str]:
        if not self.servers:
            return ["no address is given; write host:port, several between commas"]
        return [
            f"{server!r} is no address; write host:port, several between commas"
            for server in self.servers
            if not (found := _ADDRESS.fullmatch(server)) or not 0 < int(found[2]) < 65536
        ]

    def _wrong_security(self) -> list[str]:
        wrong = []
        for name, value, known in (
            ("security_protocol", self.security_protocol, get_args(SecurityProtocol)),
            ("sasl_mechanism", self.sasl_mechanism, ("", *get_args(SaslMechanism))),
        ):
            if value not in known:
                wrong.append(f"{name} {value!r} is not known{did_you_mean(value, filter(None, known))}")
        if wrong:
            return wrong
        if self.authenticated:
            wrong += [
                f"security_protocol {self.security_protocol} needs {name}; set it"
                for name in ("sasl_mechanism", "sasl_username", "sasl_password")
                if not getattr(self, name)
            ]
        else:
            given = [n for n in ("sasl_mechanism", "sasl_username", "sasl_password") if getattr(self, n)]
            if given:
                wrong.append(
                    f"{given[0]} is set, but security_protocol is {self.security_protocol};"
                    " set it to SASL_SSL or SASL_PLAINTEXT"
                )
        if self.ca_file and not self.encrypted:
            wrong.append(
                f"ca_file is set, but security_protocol is {self.security_protocol}; set it to SSL or SASL_SSL"
            )
        elif self.ca_file and not Path(self.ca_file).is_file():
            wrong.append(f"ca_file {self.ca_file!r} is not there; name a PEM file")
        return wrong

    def _wrong_names(self) -> list[str]:
        return [
            f"{name} {value!r} cannot stand in a {what}'s name; use letters, digits, '.', '_' and '-'"
            for name, value, what in (("prefix", self.prefix, "topic"), ("groups", self.groups, "group"))
            if not _TOPIC_PART.fullmatch(value)
        ]
