"""How much of real recordings is read rightly: events after de-duplication against what the bodies carry.

The recordings are no part of this repository. `FLYBALL_RECORDINGS` (or the first argument) names their folder: one
folder each, with `index.ndjson` (the bodies as posted) and `truth.ndjson` (every call, and what the bodies hold of it).
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from flyball.core.events import AgentStep, Batch, Event, LlmCall
from flyball.streams.dedup import Deduplicator
from flyball.streams.formats.litellm import LiteLlm
from flyball.streams.formats.otlp import Otlp

FORMATS: dict[str, type[Otlp] | type[LiteLlm]] = {"/v1/traces": Otlp, "/ingest/litellm": LiteLlm}
TOKENS = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cached_tokens": "cache_read_tokens",
    "cache_write_tokens": "cache_write_tokens",
    "reasoning_tokens": "reasoning_tokens",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(folder: Path) -> tuple[list[Event], int, Counter[str], Counter[str]]:
    """Events that count, duplicates, rejected and ignored by reason."""
    formats = {path: make() for path, make in FORMATS.items()}
    dedup = Deduplicator()
    events: list[Event] = []
    rejected: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for entry in lines(folder / "index.ndjson"):
        if entry["path"] not in formats:
            continue
        body = (folder / entry["file"]).read_bytes()
        if entry["file"].endswith(".gz"):
            body = gzip.decompress(body)
        decoded = formats[entry["path"]].decode(body, entry["content_type"])
        rejected.update(r.reason for r in decoded.rejected)
        ignored.update(decoded.ignored)
        sender = f"{entry['user_agent']}"
        events += dedup.feed(Batch(decoded.events, sender=sender, received_at=None)).events
    return events, dedup.duplicates, rejected, ignored


def match(
    calls: list[LlmCall], truth: list[dict[str, Any]], times: dict[str, list[float]]
) -> list[tuple[dict[str, Any], LlmCall | None]]:
    """Each true call with the event that tells of it: by response id, else the nearest free one in time."""
    by_id = {c.id: c for c in calls if c.id}
    free = {id(c): c for c in calls}
    pairs: list[tuple[dict[str, Any], LlmCall | None]] = []
    late: list[dict[str, Any]] = []
    for call in truth:
        found = by_id.get(call.get("response_id") or "")
        if found is not None and id(found) in free:
            del free[id(found)]
            pairs.append((call, found))
        else:
            late.append(call)
    for call in late:
        if not call["carried"].get("events"):
            continue
        when = times.get(call["call"])
        best, distance = None, 2.0
        for c in free.values():
            start = c.at - (c.latency_s or 0.0)
            far = min((abs(start - t) for t in when), default=9.0) if when else 1.0
            # A failed attempt of a call that went well, and calls made at once, are told apart by what they say.
            far += 0.5 if (call["class"] == "ok") != (c.error == "") else 0.0
            far += 0.5 if c.input_tokens not in (None, call["carried"].get("input_tokens")) else 0.0
            far += 0.2 if c.output_tokens not in (None, call["carried"].get("output_tokens")) else 0.0
            if far < distance:
                best, distance = c, far
        if best is not None:
            del free[id(best)]
        pairs.append((call, best))
    return pairs


def differences(call: dict[str, Any], event: LlmCall | None) -> list[str]:
    if event is None:
        return ["no event"]
    carried, found = call["carried"], []
    for name, attribute in TOKENS.items():
        wanted, got = carried.get(name), getattr(event, attribute)
        if wanted and wanted != got:
            found.append(f"{name}: carried {wanted}, read {got}")
    wanted = carried["class"]
    accept = {wanted, *call.get("class_accept", ())} if wanted not in ("ok", "none") else {""}
    if call["class"] == "ok":
        accept.add("")  # carried tells the class of the failed attempt before it, an event of its own
    if event.error not in accept:
        found.append(f"class: carried {wanted}, read {event.error or 'ok'}")
    names = {event.model, event.model_served}
    if carried.get("model_requested") and call["model_requested"] not in names:
        found.append(f"model requested: {call['model_requested']}, read {sorted(names)}")
    if carried.get("model_served") and call["model_served"] not in names:
        found.append(f"model served: {call['model_served']}, read {sorted(names)}")
    if carried.get("session") and event.run != call["conversation"]:
        found.append(f"session: {call['conversation']}, read {event.run}")
    if carried.get("response_id") and event.id != call["response_id"]:
        found.append(f"response id: {call['response_id']}, read {event.id}")
    return found


def compare(folder: Path, verbose: bool = True) -> tuple[bool, bool]:
    """Whether the number of calls lies within the recording's bounds, and whether every figure besides is as the bodies carry it."""
    truth = lines(folder / "truth.ndjson")
    summary = truth[-1]
    carried = summary["carried"]
    events, duplicates, rejected, ignored = read(folder)
    calls = [e for e in events if isinstance(e, LlmCall)]
    steps = sum(isinstance(e, AgentStep) for e in events)
    twice = carried["calls_told_twice"]
    low = carried["llm_calls"]
    high = carried["llm_events"] - twice["same_response_id"] - twice["parent_child"]
    times: dict[str, list[float]] = {}
    for line in truth:
        if line["type"] == "attempt":
            times.setdefault(line["call"], []).append(line["t"])
    told = [t for t in truth if t["type"] == "call"]
    wrong = [(c["call"], c["case"], d) for c, e in match(calls, told, times) for d in differences(c, e)]
    sums = {n: sum(getattr(c, a) or 0 for c in calls) for n, a in TOKENS.items()}
    off = {n: (v, carried[n]) for n, v in sums.items() if v != carried[n]}
    ok = low <= len(calls) <= high and not rejected
    print(
        f"{folder.name:34} calls {len(calls):3} in [{low}, {high}] {'ok ' if ok else 'OUT'} duplicates {duplicates:3} "
        f"steps {steps:3} rejected {dict(rejected)} ignored {dict(ignored)} token sums {off or 'equal'}"
    )
    if verbose:
        for difference in wrong:
            print("    ", *difference)
    return ok, ok and not wrong and not off


def folders_in(where: str) -> list[Path]:
    """The recordings of a folder, or of `telemetry` within it; none, with a word about it, where there are none."""
    found = (
        [p.parent for part in ("", "telemetry") for p in (Path(where) / part).glob("*/truth.ndjson")]
        if where
        else []
    )
    if not found:
        print(
            "no recordings: set FLYBALL_RECORDINGS to their folder, or give it as the first argument",
            file=sys.stderr,
        )
    return sorted(found)


def run() -> list[dict[str, Any]]:
    folders = folders_in(os.environ.get("FLYBALL_RECORDINGS", ""))
    if not folders:
        return []
    found = [compare(folder) for folder in folders]
    within, exact = (sum(x) / len(found) for x in zip(*found, strict=True))
    # A gateway's recording says the names that callers used for models, the gateway those it was set up with: that is only told.
    return [
        {"name": f"recordings.{name}", "value": round(value, 4), "unit": "ratio", "baseline": None, "ratio": None, "bar": bar,
         "holds": None if bar is None else value >= bar}
        for name, value, bar in (("calls_within_bounds", within, 1.0), ("read_exactly", exact, None))
    ]  # fmt: skip


def main() -> int:
    folders = folders_in(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("FLYBALL_RECORDINGS", ""))
    if not folders:
        return 0
    good = [exact for _, exact in map(compare, folders)]
    print(f"{sum(good)} of {len(good)} recordings read exactly")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
