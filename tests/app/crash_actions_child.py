"""The embedded runtime that acts, on a script in virtual time: with a lease and with a hook on loopback. Killed and started again by tests.

    python -m tests.app.crash_actions_child govern DATABASE SCRIPT SNAPSHOT_EVERY_S HOOK_URL LEFT_OUT
    python -m tests.app.crash_actions_child hook PORT FOLDER

Virtual time waits while the dispatcher has something to send or to ask, so that a request takes no virtual minutes. LEFT_OUT steps of
the script came while no process was alive and are lost. After each step its number and its time go to standard output.

The hook is the example, in a process of its own that nobody kills. It does not compare its own clock with the script's.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import text

from flyball.app.embedded import Embedded
from flyball.app.hooks import StoredOperations, wanted
from flyball.app.logs import configure_logging
from flyball.app.pipeline import Pipeline
from flyball.app.settings import Settings
from flyball.app.store import operations
from flyball.app.store.sqlite import open_reader
from flyball.app.wiring import pipeline_config
from flyball.core.codec import decode_events
from flyball.remediation import actions
from flyball.remediation.hooks import Dispatcher, HookClient, HookDispatchSettings, hooks_client
from flyball.runbooks.loader import RunbookSet, load_runbooks, load_texts
from tests.app.crash_child import ScriptClock, Step
from tests.remediation._hooks import SECRET, hook
from tests.remediation.test_hooks_conformance import example

DRAIN = """
runbook: v1
name: gpu-drain
owner: infra
when: incident.root.kind in ["gpu", "node"] && incident.signal == "gpu.fault"
mode: auto
limits: {cooldown: 1h, runs: 3/1h, attempts: 2, blast: {traffic: 100%, gpus: 16, gpu_share: 100%}}
steps:
  - hook: {name: nodes, action: drain, targets: ["node:node-1"], for: 3m}
    verify: {within: 2m, expect: 'calls_per_min("from") < 200% * before', against: nothing}
    retry: {count: 2, backoff: 5s}
    undo: hook
    release: resolved
on_failure: undo_and_page
"""
NODE = "node-1"


def runbooks() -> RunbookSet:
    """The failover as shipped but for its mode, and a drain by a hook; no others, which would only suggest."""
    kinds = actions.registry()
    shipped = load_runbooks([], actions=kinds, mode_override={"provider-failover": "auto"})
    failover = [r for r in shipped if r.name == "provider-failover"]
    return RunbookSet((*failover, *load_texts({"gpu-drain.yaml": DRAIN}, actions=kinds)))


def pipeline() -> Pipeline:
    return Pipeline(pipeline_config(Settings(mode="auto"), runbooks=runbooks()))


def played(database: Path) -> int:
    """Steps that an earlier life made durable. What the hook said stands in the log between them."""
    if not database.exists():
        return 0
    engine = open_reader(database)
    with engine.connect() as c:
        count = c.execute(text("select count(*) from log where kind in ('events', 'tick')")).scalar()
    engine.dispose()
    return int(count or 0)


def busy(runtime: Embedded) -> bool:
    with runtime.reader.connect() as c:
        return bool(operations.due_operations(c, runtime.clock.now(), 1))


async def dispatch(runtime: Embedded, url: str) -> None:
    there = [hook(url)]
    async with hooks_client(there) as client:
        await Dispatcher(
            StoredOperations(runtime),
            HookClient(there, client, runtime.clock),
            partial(wanted, runtime),
            clock=runtime.clock,
            rng=random.Random(),
            settings=HookDispatchSettings(poll_s=0.01),
        ).run(asyncio.Event())


def play(runtime: Embedded, clock: ScriptClock, steps: list[Step], after: int) -> None:
    for number, step in enumerate(steps[after:], after + 1):
        clock.at = step.at
        if step.events is None:
            stored = runtime.tick()
        else:
            stored = runtime.ingest(decode_events(step.events), step.sender, step.at)
        if not runtime.wait_for(stored.result(60)):
            raise AssertionError(f"step {number} was not processed")
        print(number, step.at, flush=True)
        end = time.monotonic() + 60
        while busy(runtime):
            if time.monotonic() > end:
                raise AssertionError(f"the hook's dispatcher hangs at step {number}")
            time.sleep(0.002)


def govern(database: Path, script: Path, snapshot_every_s: float, url: str, left_out: int) -> None:
    steps = msgspec.msgpack.decode(script.read_bytes(), type=list[Step])
    clock = ScriptClock()
    after = played(database) + left_out
    clock.at = steps[max(0, after - 1)].at
    runtime = Embedded(pipeline, database, clock, snapshot_every_s=snapshot_every_s)
    runtime.start()
    threading.Thread(target=asyncio.run, args=(dispatch(runtime, url),), daemon=True).start()
    play(runtime, clock, steps, after)
    if not runtime.stop(60):
        raise SystemExit("did not drain")


def serve_hook(port: int, folder: Path) -> None:
    receiver = example()

    class OutOfTime(receiver.Hook):  # type: ignore[misc, name-defined]
        """Signatures and deadlines are of the script's time."""

        def signed(self, headers: dict[str, str], body: bytes) -> bool:
            given = {k.lower(): v for k, v in headers.items()}
            at = datetime.fromtimestamp(int(given.get("webhook-timestamp", "0")), UTC)
            good: str = self.webhook.sign(given.get("webhook-id", ""), at, body.decode())
            return good == given.get("webhook-signature")

        def take(self, order: dict[str, Any]) -> dict[str, Any]:
            with (folder / "asked.log").open("a") as log:
                print(order["operation_id"], order["verb"], order["attempt"], order["dry_run"], file=log)
            # Slow enough to be killed in between: before the order is written down, and before it is answered.
            time.sleep(0.02)
            answer: dict[str, Any] = super().take({**order, "deadline": time.time() + 60})
            time.sleep(0.02)
            return answer

    world = receiver.World(folder, [NODE])
    receiver.serve(OutOfTime(folder, world, SECRET.get_secret_value(), 0.05), port).serve_forever()


def main() -> None:
    configure_logging()  # to standard error: standard output is for positions
    if sys.argv[1] == "hook":
        serve_hook(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        govern(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5], int(sys.argv[6]))


if __name__ == "__main__":
    main()
