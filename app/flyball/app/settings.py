"""Everything a person can set, in one place: `flyball.yaml`, then `FLYBALL_…` variables, then the command line.

`docs/settings.md` is generated from these models, so a field's description is its documentation.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from flyball.core.errors import ConfigError, did_you_mean
from flyball.remediation.hooks import HookSettings
from flyball.remediation.notifiers import NotifySettings
from flyball.remediation.notifiers._settings import with_secrets
from flyball.runbooks.yaml_nodes import Document, parse
from flyball.streams.kafka.config import KafkaConfig, SaslMechanism, SecurityProtocol
from flyball.streams.kafka.topics import TAKEN_IN
from flyball.streams.labels import LabelRules

Mode = Literal["observe", "suggest", "approve", "auto"]
Positive = Annotated[float, Field(gt=0)]

PREFIX: Final = "FLYBALL_"
OTHER_VARIABLES: Final = frozenset(
    {
        "FLYBALL_URL",
        "FLYBALL_TOKEN",
        "FLYBALL_RECORDINGS",
        "FLYBALL_REQUIRE_SERVERS",
        "FLYBALL_TEST_KAFKA",
        "FLYBALL_TEST_KAFKA_IMAGE",
        "FLYBALL_TEST_POSTGRES",
    }
    | {f"FLYBALL_POINT_{name}" for name in ("NAME", "KEEP", "LIMIT_SHARE", "GROUPS", "LABELS")}
)
"""Variables of ours that are no settings: the command line's client, the benchmarks, the tests, the LiteLLM guard."""
_SECRET: Final = frozenset({"tokens", "hash_key", "notify", "hooks", "slack", "kafka", "database"})
"""Settings whose values are never shown, because secrets stand in them."""
_SERVICE_LINK: Final = re.compile(r"FLYBALL_(\w+_)?(PORT|SERVICE)(_\w+)?")
"""What Kubernetes sets in every pod for a service that is called flyball."""


class Token(BaseModel):
    """One bearer token and what it may do."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Who holds it; shown in logs and the ledger.")
    token: SecretStr = Field(description="The secret itself, at least 16 characters.", min_length=16)
    roles: set[Literal["ingest", "read", "enforce", "operate", "admin"]] = Field(
        description="`ingest` sends events, `read` sees status and incidents, `enforce` holds directives and reports on them, "
        "`operate` acknowledges and approves, `admin` may do everything and sees dead letters."
    )


class ScrapeTarget(BaseModel):
    """One Prometheus endpoint to scrape: dcgm-exporter, vLLM or SGLang."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="Address of the metrics page, e.g. `http://gpu-1:9400/metrics`.")
    every_s: Positive = Field(15.0, description="Seconds between scrapes.")
    timeout_s: Positive = Field(
        5.0, description="Seconds after which a scrape is given up and counted as failed."
    )
    node: str = Field("", description="Node name, where the exporter does not tell it.")
    deployment: str = Field(
        "", description="Name of the inference server, where it does not tell it; default is host:port."
    )


class SlackSettings(BaseModel):
    """Buttons in Slack: who pressed one, and that it was Slack who says so."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    signing_secret: SecretStr = Field(
        min_length=16, description="The app's signing secret; what is not signed with it is refused."
    )
    users: dict[str, str] = Field(
        default_factory=dict,
        description="Slack's user id → name here, e.g. `U0123ABCD: ann`. Who made a change does not approve what answers it: "
        "use the names that changes are reported under. Others are refused.",
    )
    anyone: bool = Field(
        False, description="Also take the word of users that are not listed, under the name `slack:ID`."
    )


class LimitSettings(BaseModel):
    """How much Flyball takes before it says no."""

    model_config = ConfigDict(extra="forbid")

    body_bytes: int = Field(
        32 << 20, gt=0, description="Largest body, after decompression; a larger one is answered 413."
    )
    pending_bytes: int = Field(
        256 << 20, gt=0, description="Memory for bodies that wait for their commit; over it: 429."
    )
    backlog_bytes: int = Field(
        4 << 30,
        gt=0,
        description="Disk for events that the stages have not read yet; over it 429, LiteLLM only over twice that.",
    )
    memory_events: int = Field(
        200_000,
        gt=0,
        description="Events kept decoded between ingest and stages; more are read back from disk.",
    )


class RetentionSettings(BaseModel):
    """How long things are kept. Nothing that the stages still need is ever removed."""

    model_config = ConfigDict(extra="forbid")

    log_s: Positive = Field(86_400.0, description="Age of events in the log.")
    log_bytes: int = Field(4 << 30, gt=0, description="Size of the log.")
    dead_letters_s: Positive = Field(86_400.0, description="Age of dead letters.")
    dead_letters_bytes: int = Field(
        256 << 20, gt=0, description="Size of dead letters; over it new ones are kept without their bytes."
    )
    dead_letter_bytes: bool = Field(
        True,
        description="Keep the bytes of dead letters, content fields removed where the body parses; else only reason and size.",
    )


class KafkaSettings(BaseModel):
    """Apache Kafka. `kafka: HOST:PORT` and `FLYBALL_KAFKA=HOST:PORT` set the address alone; the other variables are `FLYBALL_KAFKA_NAME`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    bootstrap: str = Field(
        "", description="`host:port` of the cluster, several between commas; empty means without Kafka."
    )
    security_protocol: SecurityProtocol = Field(
        "PLAINTEXT", description="How the brokers' listener is protected."
    )
    sasl_mechanism: SaslMechanism | None = Field(None, description="How the password is proven, with SASL.")
    sasl_username: str = Field("", description="Name, with SASL.")
    sasl_password: SecretStr = Field(SecretStr(""), description="Password, with SASL.")
    ca_file: Path | None = Field(
        None,
        description="PEM file with the authorities to trust, with SSL; default is the system's.",
    )
    prefix: str = Field(
        "flyball.",
        description="What the names of all topics begin with; two Flyballs on one cluster need two.",
    )
    groups: str = Field(
        "",
        description="What the names of the consumer groups begin with; empty means as `prefix`. With another one, workers read all topics again "
        "from their start; what the database knows already counts and acts no second time.",
    )
    partitions: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Partitions of the topics that events come in by, and so how many workers can share them. Never made fewer.",
    )
    replication: int = Field(
        -1,
        ge=-1,
        le=100,
        description="Copies of each topic that `flyball topics create` makes; -1 is the broker's default.",
    )
    formats: dict[str, str] = Field(
        default_factory=dict,
        description="Format of a topic's values where a record's header does not say it, by the topic's name without prefix: "
        "`{llm-calls: litellm}`; default `native`.",
    )
    idle_s: Positive = Field(
        2.0,
        description="A partition read to its end that had nothing for so long is idle: windows wait for it no longer than exporters hold calls back (some seconds).",
    )
    stall_s: Positive = Field(
        30.0,
        description="Longest wait for a partition that nobody reads, while others are read; what it tells later of closed windows is counted as late.",
    )
    snapshot_s: Positive = Field(
        5.0,
        description="Seconds between snapshots of the window stage, longer for large states; a restart reads the topics again from the last.",
    )
    stuck_s: Positive = Field(
        60.0,
        description="A worker ends, to be started again, when for so long records wait and none is read, or it cannot join its group, "
        "or no broker answers.",
    )
    poison_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of lines that cannot be taken over which a partition stands, instead of going to the dead letters.",
    )
    poison_least: int = Field(
        100, ge=1, description="Lines of a partition, good and bad, below which nothing is concluded."
    )
    poison_window_s: Positive = Field(
        60.0, description="The share is that of the lines of the newest so many seconds."
    )
    poison_retry_s: Positive = Field(
        20.0,
        description="A partition that stands is tried again after so long. Below `stall_s`, a short spell of bad lines makes nothing late.",
    )

    @field_validator("bootstrap", mode="after")
    @classmethod
    def _without_scheme(cls, value: str) -> str:
        return value.strip().removeprefix("kafka://")

    @model_validator(mode="after")
    def _can_work(self) -> KafkaSettings:
        unknown = sorted(set(self.formats) - set(TAKEN_IN))
        if unknown:
            raise ValueError(
                f"formats: no event comes in by topic {unknown[0]!r}{did_you_mean(unknown[0], TAKEN_IN)}"
            )
        if self.bootstrap:
            try:
                self.config()
            except ConfigError as e:
                raise ValueError(e.what) from e
        return self

    def config(self) -> KafkaConfig:
        """What the clients are given. Raises: ConfigError where no address is set."""
        return KafkaConfig(
            bootstrap=self.bootstrap,
            security_protocol=self.security_protocol,
            sasl_mechanism=self.sasl_mechanism or "",
            sasl_username=self.sasl_username,
            sasl_password=self.sasl_password.get_secret_value(),
            ca_file=str(self.ca_file or ""),
            prefix=self.prefix,
            groups=self.groups,
        )


class Settings(BaseSettings):
    """Flyball's settings. A wrong one stops start-up, with one message that lists all that are wrong."""

    model_config = SettingsConfigDict(env_prefix="FLYBALL_", env_nested_delimiter="__", extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. Other than loopback needs `tokens`.")
    port: int = Field(4390, ge=0, le=65535, description="Port to listen on.")
    data: Path = Field(
        Path("flyball-data"),
        description="Folder of the database. Paths in the settings file count from the file, others from where Flyball is started.",
    )
    database: SecretStr = Field(
        SecretStr(""),
        description="Address of a PostgreSQL, `postgresql://USER:PASSWORD@HOST:PORT/NAME`; empty means SQLite in the folder `data`.",
    )
    runbooks: list[Path] = Field(
        default_factory=list,
        description="Folders or files with runbooks; a runbook named like a shipped one replaces it.",
    )
    mode: Mode = Field("suggest", description="Ceiling on the runbooks' own modes.")
    modes: dict[str, Mode] = Field(
        default_factory=dict,
        description="Mode of single runbooks here, by name, in place of what their files say: `{provider-failover: auto}`.",
    )
    dry_run: bool = Field(
        False, description="Decide and record everything, also in `auto`, but let nothing take effect."
    )
    window_s: Positive = Field(10.0, description="Length of a window of event time, seconds.")
    lateness_s: float = Field(
        2.0, ge=0, description="How far events of one sender may be out of order, seconds."
    )
    max_delay_s: Positive = Field(
        15.0, description="Longest wait for a slow sender, seconds behind the newest event."
    )
    max_cells: int = Field(
        100_000, ge=100, description="Label combinations told apart; the rarest beyond that go to `other`."
    )
    false_pages_per_week: Positive = Field(
        2.0, description="How often Flyball may wake you in error, all series together."
    )
    cooldown_s: float = Field(
        300.0, ge=0, description="A departure that ended and comes back within this time is the same one."
    )
    page_severity: Literal["low", "medium", "high", "critical"] = Field(
        "high", description="Least severity that wakes a person."
    )
    labels: LabelRules = Field(
        default_factory=LabelRules, description="Where app, tenant, team, prompt version and run come from."
    )
    hash_key: SecretStr = Field(
        SecretStr(""),
        description="Key of the hashes of tool arguments and results; made and kept in the data folder when empty.",
    )
    tokens: list[Token] = Field(default_factory=list, description="Bearer tokens; none needed on loopback.")
    scrape: list[ScrapeTarget] = Field(default_factory=list, description="Prometheus endpoints to scrape.")
    notify: NotifySettings = Field(default_factory=NotifySettings, description="Where alerts go.")
    hooks: list[HookSettings] = Field(
        default_factory=list, description="Remediation hooks that runbooks may ask, by name."
    )
    slack: SlackSettings | None = Field(
        None, description="Buttons in Slack; `POST /v1/slack` is the address to give to Slack."
    )
    kafka: KafkaSettings = Field(default_factory=KafkaSettings, description="Apache Kafka, where it is used.")
    limits: LimitSettings = Field(
        default_factory=LimitSettings, description="How much is taken before 413 or 429."
    )
    retention: RetentionSettings = Field(
        default_factory=RetentionSettings, description="How long things are kept."
    )
    snapshot_every_s: Positive = Field(
        30.0,
        description="Seconds between snapshots of the stages' state; a restart re-reads the log from the last.",
    )
    synchronous: Literal["full", "normal"] = Field(
        "full",
        description="Durability: `normal` may lose the last milliseconds on power loss, never on a crash of Flyball; on PostgreSQL also on a crash of its server.",
    )
    public_url: str = Field(
        "", description="Address of this Flyball in links of alerts; default is host and port."
    )

    @field_validator("runbooks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        wrong = []
        if not is_loopback(self.host) and not self.tokens:
            wrong.append(
                f"host: listening on {self.host} needs `tokens`; set at least one, or listen on 127.0.0.1"
            )
        if self.max_delay_s < self.lateness_s:
            wrong.append(
                f"max_delay_s: {self.max_delay_s:g} is less than lateness_s = {self.lateness_s:g}; make it at least that"
            )
        hooks = [h.name for h in self.hooks]
        wrong += [
            f"hooks: two are named {n!r}; give each its own name"
            for n in sorted({n for n in hooks if hooks.count(n) > 1})
        ]
        names = [t.name for t in self.tokens]
        wrong += [
            f"tokens: two are named {n!r}; give each its own name"
            for n in sorted({n for n in names if names.count(n) > 1})
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, _Variables(settings_cls), _File(settings_cls))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nested(name: str) -> str:
    """`flyball_kafka` → `flyball_kafka__bootstrap`, `flyball_kafka_ca_file` → `flyball_kafka__ca_file`; others as they are."""
    head, _, rest = name.partition("flyball_kafka")
    if head or not name.startswith("flyball_kafka"):
        return name
    if not rest:
        return "flyball_kafka__bootstrap"
    return f"flyball_kafka__{rest[1:]}" if rest[1:] in KafkaSettings.model_fields else name


class _Variables(EnvSettingsSource):
    """`FLYBALL_…` variables. Lists and groups are JSON; `FLYBALL_RUNBOOKS` may also be paths between colons or commas."""

    environ: ClassVar[Mapping[str, str]] = os.environ

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {_nested(name.lower()): value for name, value in self.environ.items()}

    def prepare_field_value(self, field_name: str, field: Any, value: Any, value_is_complex: bool) -> Any:
        if field_name == "runbooks" and isinstance(value, str) and not value.lstrip().startswith("["):
            return [part.strip() for part in re.split(r"[:,]", value) if part.strip()]
        try:
            return super().prepare_field_value(field_name, field, value, value_is_complex)
        except ValueError:
            if value is not None:
                return value  # validation then says where it stands, and what it should be
            head = f"{PREFIX}{field_name}".upper()
            names = ", ".join(sorted(v for v in _Variables.environ if v.upper().startswith(head)))
            raise ConfigError(
                "is not JSON; lists and groups are written as JSON in variables", where=names
            ) from None


class _File(PydanticBaseSettingsSource):
    """The YAML file below the variables; `load` puts its content here."""

    content: ClassVar[dict[str, Any]] = {}

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self.content.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(self.content)


def load(
    config: Path | None = None, *, environ: Mapping[str, str] = os.environ, **overrides: Any
) -> Settings:
    """Settings from file, variables and `overrides` (the command line; None means not given).

    Raises: ConfigError, one for all that is wrong.
    """
    document = _read(config) if config is not None else None
    content = with_secrets(document.root.plain(), environ, str(config)) if document else {}
    if config is not None:
        content = _beside(content, config.parent)
    given = {k: v for k, v in overrides.items() if v is not None}
    for of in (content, given):
        if isinstance(of.get("kafka"), str):  # the address alone; merges with what other sources say
            of["kafka"] = {"bootstrap": of["kafka"]}
    _File.content.clear()
    _File.content.update(content)
    _Variables.environ = environ
    try:
        return Settings(**given)
    except ValidationError as e:
        lines = [line for error in e.errors() for line in _told(error, document, set(given))]
    finally:
        _File.content.clear()
        _Variables.environ = os.environ
    count = f"{len(lines)} settings are wrong" if len(lines) > 1 else "one setting is wrong"
    raise ConfigError(f"{count}:\n" + "\n".join(f"  {line}" for line in lines))


def _beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths of a file count from the file, so that it means the same wherever Flyball is started."""

    def placed(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) else value

    found = dict(content)
    if "data" in found:
        found["data"] = placed(found["data"])
    if isinstance(found.get("runbooks"), list):
        found["runbooks"] = [placed(v) for v in found["runbooks"]]
    for group, name in (("notify", "templates"), ("kafka", "ca_file")):
        if isinstance(found.get(group), dict) and name in found[group]:
            found[group] = found[group] | {name: placed(found[group][name])}
    return found


def _read(config: Path) -> Document | None:
    """The settings file; None when it holds nothing but comments."""
    try:
        text = config.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot be read ({e.strerror}); name an existing file", where=str(config)) from e
    if not any(line.strip() and not line.lstrip().startswith(b"#") for line in text.splitlines()):
        return None
    try:
        document = parse(text, str(config))
    except ConfigError as e:
        raise ConfigError(e.what, where=e.where) from e
    if not isinstance(document.root.value, dict):
        raise ConfigError("holds no settings; write `name: value` lines", where=str(config))
    return document


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that set nothing, with what was probably meant. Told, not refused: others may set them."""
    found = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES or _SERVICE_LINK.fullmatch(name):
            continue
        head = _nested(name.lower()).removeprefix(PREFIX.lower()).partition("__")[0]
        if head not in Settings.model_fields:
            known = [PREFIX + field.upper() for field in Settings.model_fields]
            known += [f"{PREFIX}KAFKA_{field.upper()}" for field in KafkaSettings.model_fields]
            found.append(f"{name} sets nothing{did_you_mean(name, known)}")
    return found


def _variable_of(path: tuple[int | str, ...]) -> str:
    """The variable that sets this value or a group around it; empty when none does."""
    names = {_nested(name.lower()).upper(): name for name in _Variables.environ}
    if path == ("kafka",):  # a rule over several of the group's
        return ", ".join(
            sorted(name for nested, name in names.items() if nested.startswith("FLYBALL_KAFKA__"))
        )
    for depth in range(len(path), 0, -1):
        name = f"{PREFIX}{'__'.join(map(str, path[:depth]))}".upper()
        if name in names:
            return names[name]
    return ""


def _told(error: ErrorDetails, document: Document | None, given: set[str]) -> list[str]:
    """Lines of `setting (source): what is wrong; what would be right`."""
    path = error["loc"]
    if not path:  # a rule over several settings, already in words
        return [line.removeprefix("Value error, ") for line in error["msg"].splitlines()]
    head, name = str(path[0]), ".".join(map(str, path))
    unknown = error["type"] == "extra_forbidden"
    source = "default"
    if head in given:
        source = ", ".join(filter(None, ["command line", _variable_of(path) if head == "kafka" else ""]))
    elif variable := _variable_of(path):
        source = variable
    elif document is not None:
        line, column = document.place(tuple(p for p in path if isinstance(p, int | str)), key=unknown)
        source = f"{document.path}:{line}:{column}"
    if unknown:
        known: Any = Settings.model_fields if len(path) == 1 else ()
        return [f"{name} ({source}): no such setting{did_you_mean(head, known) if known else ''}"]
    what = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = ""
    if head not in _SECRET and isinstance(value, str | int | float | bool):
        shown = f"; it is {str(value)[:60]!r}"
    if head == "port" and isinstance(value, str) and value.startswith("tcp://"):
        shown += ", which Kubernetes sets for a service called flyball: set `enableServiceLinks: false`"
    return [f"{name} ({source}): {what[:1].lower()}{what[1:]}{shown}"]
