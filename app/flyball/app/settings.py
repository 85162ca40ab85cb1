"""Everything a person can set, in one place: `flyball.yaml`, then `FLYBALL_…` variables, then the command line.

`docs/settings.md` is generated from these models, so a field's description is its documentation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from flyball.core.errors import ConfigError, did_you_mean
from flyball.remediation.notifiers import NotifySettings
from flyball.remediation.notifiers._settings import with_secrets
from flyball.streams.labels import LabelRules

Mode = Literal["observe", "suggest", "approve", "auto"]
Positive = Annotated[float, Field(gt=0)]


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


class Settings(BaseSettings):
    """Flyball's settings. A wrong one stops start-up, with one message that lists all that are wrong."""

    model_config = SettingsConfigDict(env_prefix="FLYBALL_", env_nested_delimiter="__", extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. Other than loopback needs `tokens`.")
    port: int = Field(4390, ge=0, le=65535, description="Port to listen on.")
    data: Path = Field(
        Path("flyball-data"),
        description="Folder of the database. Paths in the settings file count from the file, others from where Flyball is started.",
    )
    runbooks: list[Path] = Field(
        default_factory=list,
        description="Folders or files with runbooks; a runbook named like a shipped one replaces it.",
    )
    mode: Mode = Field("suggest", description="Ceiling on the runbooks' own modes.")
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
        description="SQLite's durability: `normal` may lose the last milliseconds on power loss, never on a crash.",
    )
    public_url: str = Field(
        "", description="Address of this Flyball in links of alerts; default is host and port."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, _File(settings_cls))


class _File(PydanticBaseSettingsSource):
    """The YAML file below the variables; `load` puts its content here."""

    content: ClassVar[dict[str, Any]] = {}

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self.content.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(self.content)


def load(config: Path | None = None, **overrides: Any) -> Settings:
    """Settings from file, variables and `overrides` (the command line; None means not given).

    Raises: ConfigError, one for all that is wrong.
    """
    content: dict[str, Any] = {}
    if config is not None:
        try:
            text = config.read_text()
        except OSError as e:
            raise ConfigError(
                f"cannot be read ({e.strerror}); name an existing file", where=str(config)
            ) from e
        try:
            loaded = yaml.safe_load(text) or {}
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise ConfigError(f"is not YAML ({getattr(e, 'problem', e)})", where=f"{config}{at}") from e
        if not isinstance(loaded, dict):
            raise ConfigError("holds no settings; write `name: value` lines", where=str(config))
        content = _beside(with_secrets(loaded, os.environ, str(config)), config.parent)
    given = {k: v for k, v in overrides.items() if v is not None}
    _File.content.clear()
    _File.content.update(content)
    try:
        settings = Settings(**given)
    except ValidationError as e:
        raise ConfigError(_all_of(e, config, set(given), content)) from e
    finally:
        _File.content.clear()
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.tokens:
        raise ConfigError(
            f"listening on {settings.host} needs `tokens`; set at least one, or listen on 127.0.0.1",
            where="host",
        )
    return settings


def _beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths of a file count from the file, so that it means the same wherever Flyball is started."""

    def placed(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) else value

    found = dict(content)
    if "data" in found:
        found["data"] = placed(found["data"])
    if isinstance(found.get("runbooks"), list):
        found["runbooks"] = [placed(v) for v in found["runbooks"]]
    if isinstance(found.get("notify"), dict) and "templates" in found["notify"]:
        found["notify"] = found["notify"] | {"templates": placed(found["notify"]["templates"])}
    return found


def _all_of(error: ValidationError, config: Path | None, given: set[str], content: dict[str, Any]) -> str:
    lines = []
    for e in error.errors():
        name = ".".join(str(p) for p in e["loc"])
        head = str(e["loc"][0]) if e["loc"] else ""
        source = (
            "command line" if head in given else str(config) if head in content else f"FLYBALL_{head.upper()}"
        )
        what = e["msg"][:1].lower() + e["msg"][1:]
        if e["type"] == "extra_forbidden":
            what = f"no such setting{did_you_mean(head, Settings.model_fields)}"
        else:
            what += f"; it is {e.get('input')!r}"
        lines.append(f"  {name} ({source}): {what}")
    return f"{len(lines)} setting{'s are' if len(lines) > 1 else ' is'} wrong:\n" + "\n".join(lines)
