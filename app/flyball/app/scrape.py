"""The scrape targets of the settings, each on its own rhythm."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import structlog

from flyball.app.intake import Intake
from flyball.app.settings import ScrapeTarget, Settings
from flyball.app.writer import Overloaded
from flyball.core.errors import EffectError
from flyball.streams.formats._options import FormatOptions
from flyball.streams.formats.prometheus import Prometheus
from flyball.streams.sources.scrape import scrape

_log = structlog.get_logger(__name__)


def scrapes(intake: Intake[Any], settings: Settings) -> Iterator[Coroutine[None, None, None]]:
    format = Prometheus(FormatOptions(labels=settings.labels, hash_key=b""))
    for target in settings.scrape:
        yield _scrape_for_ever(intake, format, target)


async def _scrape_for_ever(intake: Intake[Any], format: Prometheus, target: ScrapeTarget) -> None:
    name = target.deployment or urlsplit(target.url).netloc
    failing = False
    async with httpx.AsyncClient() as client:
        while True:
            at = intake.clock.now()
            try:
                decoded = await scrape(
                    client,
                    target.url,
                    target.timeout_s,
                    lambda page, at=at: format.decode_at(page, at, name),  # type: ignore[misc]
                )
                if decoded.events:
                    stored = intake.ingest(decoded.events, f"scrape@{name}", at, format="prometheus")
                    await asyncio.wrap_future(stored)
                if failing:
                    _log.info("scrape.recovered", url=target.url)
                failing = False
            except (EffectError, Overloaded) as e:
                # Said once per outage, not every 15 s; silence of the target is judged by the detectors.
                if not failing:
                    _log.warning("scrape.failed", url=target.url, why=str(e))
                failing = True
            await asyncio.sleep(target.every_s)
