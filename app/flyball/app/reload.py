"""Hot reload: runbooks are read again when their files change. A set that is refused leaves the running one in place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import structlog

from flyball.app.embedded import Embedded
from flyball.app.orders import RunbookTexts
from flyball.app.settings import Settings
from flyball.app.wiring import runbooks_of
from flyball.core.errors import ConfigError

_log = structlog.get_logger(__name__)
EVERY_S: Final = 2.0
"""Between two looks at the files."""


class RunbookWatch:
    """Compares the files with what runs, and hands the runtime a new set when they differ and are right.

    refused: what is wrong with the files as they are, line by line; empty when they run.
    since: when the running set was taken, as far as this process knows.
    """

    def __init__(self, runtime: Embedded, settings: Settings) -> None:
        self._runtime, self._settings = runtime, settings
        self._seen: object = None
        self.refused: list[str] = []
        self.since: float | None = None

    async def look(self) -> bool:
        """Whether another set was handed in."""
        stamp = _stamp(self._settings.runbooks)
        if stamp == self._seen:
            return False
        try:
            found = await asyncio.to_thread(runbooks_of, self._settings)
        except ConfigError as e:
            self._seen, wrong = stamp, str(e).splitlines()
            if wrong != self.refused:
                _log.error("runbooks.refused", why=wrong, running=len(self._runtime.figures.runbooks))
            self.refused = wrong
            return False
        self._seen, self.refused = stamp, []
        now = self._runtime.clock.now()
        figures = self._runtime.figures
        texts = RunbookTexts.of(found, self._settings.mode, now)
        running = RunbookTexts.of(figures.runbooks, figures.ceiling, now)
        if texts.runbooks == running.runbooks and texts.ceiling == running.ceiling and figures.recorded:
            return False
        await asyncio.wrap_future(self._runtime.order(texts))
        self.since = now
        _log.info("runbooks.taken", modes={r.name: r.mode for r in found}, ceiling=self._settings.mode)
        return True

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)


def _stamp(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Changes whenever a file does; also when one comes, goes, or cannot be read."""
    found: list[tuple[str, int, int]] = []
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        except OSError:  # a file, or nothing that can be read
            inside = [path]
        for file in inside:
            try:
                at = file.stat()
            except OSError:
                found.append((str(file), 0, 0))
                continue
            found.append((str(file), at.st_mtime_ns, at.st_size))
    return found
