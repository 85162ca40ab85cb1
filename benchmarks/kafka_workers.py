"""Two workers against one: the role windows over the eight partitions of one topic, and over four each.

A topic of one call a record, written before. Each worker is a process of its own and reads from when it has its share to the ends of its
partitions; what one does before it has its share is not in it. The rate of two is the sum of theirs. By the clock it takes two free cores and some of a third for
the broker: where there are fewer, that figure says how free they were. What stands whatever else the machine does is the processor time of a
call: twice what one needs, over what two need, is how much two would do on cores of their own.

    python -m benchmarks kafka_workers
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from benchmarks._kafka import PARTITIONS, broker, fill, lines, topics
from benchmarks.pipeline_memory import Row, row
from flyball.app.tables import print_rows
from flyball.streams.kafka.config import KafkaConfig
from flyball.streams.kafka.producer import ProducerSettings
from tests.servers.kafka_broker import CannotStart

BAR_RATIO: Final = 1.8
_SECONDS: Final = 10
_PATIENCE_S: Final = 300.0


def together(config: KafkaConfig, workers: int) -> list[dict[str, Any]]:
    """What so many workers of one group say, each of its share."""
    own = f"{config.prefix}{workers}."
    topics(KafkaConfig(config.bootstrap, prefix=own))
    command = [
        sys.executable, "-m", "benchmarks._kafka_passes", "windows", config.bootstrap, config.prefix, own, str(PARTITIONS // workers),
    ]  # fmt: skip
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    try:
        said = [process.communicate(timeout=_PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [json.loads(text.splitlines()[-1]) for text in said]


def run() -> list[Row]:
    """About a minute."""
    try:
        with broker(pinned=False) as (cluster, _):
            config = KafkaConfig(cluster.bootstrap, prefix="workers.")
            topics(config)
            second = lines()
            fill(config, lambda _: second, _SECONDS, 1, ProducerSettings().compression)
            (one,), two = together(config, 1), together(config, 2)
    except CannotStart as e:
        print(f"kafka_workers: {e}", file=sys.stderr)
        return []
    by_clock = [sum(w["calls"] / w["wall_s"] for w in some) for some in ([one], two)]
    by_cpu = [
        len(some) * sum(w["calls"] for w in some) / sum(w["cpu_s"] for w in some) for some in ([one], two)
    ]
    return [
        row("two window workers of one, by processor time", round(by_cpu[1]), "calls/s", round(by_cpu[0]), round(by_cpu[1] / by_cpu[0], 2), BAR_RATIO),
        row("two window workers of one, by the clock", round(by_clock[1]), "calls/s", round(by_clock[0]), round(by_clock[1] / by_clock[0], 2)),
    ]  # fmt: skip


if __name__ == "__main__":
    print_rows(run())
