"""Prometheus metrics, read off the runtime when scraped: nothing is counted twice, nothing is paid for on the hot path."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flyball.app.embedded import Embedded


class RuntimeCollector:
    """Everything that `/metrics` shows."""

    def __init__(self, runtime: Embedded) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        r = self._runtime
        figures = r.figures
        c = figures.totals
        yield _counter(
            "flyball_received_events", "Events decoded and appended, copies included.", "format", r.received
        )
        yield _counter(
            "flyball_rejected_events",
            "Events that could not be taken; they are in the dead letters.",
            "reason",
            r.rejected,
        )
        yield _counter("flyball_events", "Events processed; each call counts once.", "type", c["events"])
        yield _counter("flyball_decisions", "Decisions about runbooks.", "decision", c["decisions"])
        yield _counter("flyball_action_outcomes", "What actions really did.", "outcome", c["outcomes"])
        yield _counter("flyball_stage_seconds", "Time spent in each stage.", "stage", figures.stage_seconds)
        for name, text, value in (
            ("flyball_duplicate_calls", "Copies of calls that were already counted.", c["duplicates"]),
            ("flyball_late_events", "Events whose window was closed; counted, in no window.", c["late"]),
            (
                "flyball_clamped_events",
                "Events from the future, set to their time of arrival.",
                c["clamped"],
            ),
            (
                "flyball_overflowed_events",
                "Events counted in an `other` cell, because max_cells was reached.",
                c["overflowed"],
            ),
            ("flyball_windows", "Windows closed.", c["windows"]),
            ("flyball_anomalies", "Anomalies that began.", c["anomalies"]),
            ("flyball_incidents", "Incidents opened.", c["incidents"]),
            ("flyball_pages", "Pages: notifications that wake a person.", c["pages"]),
            ("flyball_directives_granted", "Leases granted.", c["directives"]),
            (
                "flyball_records_left_out",
                "Records of the log that are left out, because a stage raised over them.",
                r.faults,
            ),
        ):
            metric = CounterMetricFamily(name, text)
            metric.add_metric([], float(value))
            yield metric
        lag_s, size = r.lag()
        now = r.clock.now()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("flyball_lag_seconds", "Age of the oldest record that the stages have not read.", lag_s),
            ("flyball_lag_bytes", "Bytes of the log that the stages have not read.", size),
            (
                "flyball_watermark_delay_seconds",
                "How far the watermark is behind the clock.",
                max(0.0, now - c["watermark"]) if c["watermark"] else 0.0,
            ),
            ("flyball_live_directives", "Leases in force.", len(r.board.read()[1])),
            ("flyball_stops", "Scopes for which the kill switch is on.", len(r.switchboard.stops.live)),
            ("flyball_waiting_approvals", "Plans and steps that wait for a person.", len(figures.waiting)),
            ("flyball_disabled_detectors", "Detectors switched off because they raised.", len(c["disabled"])),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=float(value))


def _counter(
    name: str, text: str, label: str, values: dict[str, int] | dict[str, float]
) -> CounterMetricFamily:
    metric = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(values.items()):
        metric.add_metric([key], float(value))
    return metric


def exposition(runtime: Embedded) -> bytes:
    registry = CollectorRegistry()
    registry.register(RuntimeCollector(runtime))
    return generate_latest(registry)
