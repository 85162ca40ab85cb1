"""From settings to running parts. Nothing else knows how they fit together."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from flyball.app.pipeline import Pipeline, PipelineConfig
from flyball.app.settings import Settings
from flyball.core.errors import ConfigError
from flyball.core.incident import Severity
from flyball.core.plugins import Registry
from flyball.core.ports import Format
from flyball.incidents.settings import IncidentSettings
from flyball.remediation import actions
from flyball.runbooks.loader import RunbookSet, load_runbooks
from flyball.streams import formats as formats_package
from flyball.streams.formats._options import FormatOptions
from flyball.streams.windows import WindowSettings

DATABASE_FILE: Final = "flyball.sqlite3"


def pipeline_config(
    settings: Settings, *, runbooks: RunbookSet | None = None, scripted: bool = False
) -> PipelineConfig:
    """Raises: ConfigError when a runbook is refused."""
    return PipelineConfig(
        windows=WindowSettings(
            window_s=settings.window_s,
            lateness_s=settings.lateness_s,
            max_delay_s=settings.max_delay_s,
            max_cells=settings.max_cells,
        ),
        incidents=IncidentSettings(page_at=Severity[settings.page_severity.upper()]),
        false_pages_per_week=settings.false_pages_per_week,
        cooldown_s=settings.cooldown_s,
        mode=settings.mode,
        scripted=scripted,
        dry_run=settings.dry_run,
        stall_s=settings.kafka.stall_s,
        runbooks=runbooks if runbooks is not None else runbooks_of(settings),
    )


def runbooks_of(settings: Settings) -> RunbookSet:
    """The shipped runbooks and a person's own, each with its mode here. Raises: ConfigError when any is refused."""
    return load_runbooks(settings.runbooks, actions=actions.registry(), mode_override=settings.modes)


def make_pipeline(
    settings: Settings, timer: Callable[[], float] | None = None, *, scripted: bool = False
) -> Pipeline:
    return Pipeline(pipeline_config(settings, scripted=scripted), timer=timer)


def make_formats(settings: Settings, hash_key: bytes) -> dict[str, Format]:
    registry = Registry("formats", formats_package)
    options = FormatOptions(labels=settings.labels, hash_key=hash_key)
    return {kind: registry.get(kind)(options) for kind in registry.kinds()}


def hash_key(settings: Settings, *, keep: bool = True) -> bytes:
    """The key of content hashes: from the settings, else from the data folder, where it is made once.

    Without it kept, the hashes of one run would not equal those of the run before, and a loop across a restart were missed.
    """
    given = settings.hash_key.get_secret_value()
    if given:
        return given.encode()
    path = settings.data / "hash.key"
    if path.exists():
        return path.read_bytes()
    key = secrets.token_bytes(32)
    if keep:
        try:
            settings.data.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=True)
            path.write_bytes(key)
        except OSError as e:
            raise ConfigError(
                f"cannot be written ({e.strerror}); set `data` to a folder that can", where=str(path)
            ) from e
    return key


def database_path(data: Path) -> Path:
    return data / DATABASE_FILE


def database_of(settings: Settings) -> Path | str:
    """Where the database is: the file in the data folder, or the address of a PostgreSQL."""
    return settings.database.get_secret_value() or database_path(settings.data)


def lab_governor(**changes: Any) -> Pipeline:
    """A pipeline with default settings, for the lab: `flyball.app.wiring:lab_governor`. `changes` are settings."""
    return Pipeline(pipeline_config(Settings.model_construct(**({"runbooks": []} | changes))))
