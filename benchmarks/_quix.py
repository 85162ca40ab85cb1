"""Quix Streams that decodes and counts: `PYTHON _quix.py BOOTSTRAP TOPIC GROUP CALLS`, in an environment that has `quixstreams`, not in ours.

The last line of output is `{"calls", "cpu_s", "wall_s"}`, from the first call on.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import time


def main(bootstrap: str, topic: str, group: str, calls: int, core: int) -> None:
    quix = importlib.import_module("quixstreams")  # not in the environment that types are checked in
    if core >= 0:
        os.sched_setaffinity(0, {core})
    app = quix.Application(
        broker_address=bootstrap, consumer_group=group, auto_offset_reset="earliest", loglevel=logging.ERROR,
        state_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    seen = 0
    begun = (0.0, 0.0)

    def count(_call: object) -> None:
        nonlocal seen, begun
        if not seen:
            begun = time.process_time(), time.perf_counter()
        seen += 1
        if seen == calls:
            cpu_s, wall_s = time.process_time() - begun[0], time.perf_counter() - begun[1]
            print(json.dumps({"calls": seen, "cpu_s": cpu_s, "wall_s": wall_s}), flush=True)

    app.dataframe(app.topic(topic, value_deserializer="json")).update(count)
    app.run(count=calls, timeout=60.0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
