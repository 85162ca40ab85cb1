"""Prometheus metrics, read off the runtime when scraped: nothing is counted twice, nothing is paid for on the hot path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flyball.app.embedded import Embedded
from flyball.app.intake import Edge

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Figure(Generic[T]):
    """One metric of a `T`. With a label, `read` gives a number for each of its values."""

    name: str
    text: str
    read: Callable[[T], Any]
    kind: Literal["counter", "gauge"] = "counter"
    label: str = ""


class FigureCollector(Collector, Generic[T]):
    """The metrics of one object, as a table says."""

    def __init__(self, of: T, figures: Sequence[Figure[T]]) -> None:
        self._of, self._figures = of, figures

    def collect(self) -> Iterator[Metric]:
        for f in self._figures:
            found = f.read(self._of)
            if f.label:
                family = CounterMetricFamily if f.kind == "counter" else GaugeMetricFamily
                metric = family(f.name, f.text, labels=[f.label])
                for key, value in sorted(found.items()):
                    metric.add_metric([key], float(value))
                yield metric
            elif f.kind == "gauge":
                yield GaugeMetricFamily(f.name, f.text, value=float(found))
            else:
                yield CounterMetricFamily(f.name, f.text, value=float(found))


class RuntimeCollector(Collector):
    """Everything that `/metrics` shows.

    Args:
        edge: the way in, where that is not the runtime itself.
    """

    def __init__(self, runtime: Embedded, edge: Edge[Any] | None = None) -> None:
        self._runtime, self._edge = runtime, edge

    def collect(self) -> Iterator[Metric]:
        r = self._runtime
        figures = r.figures
        c = figures.totals
        received, rejected = r.received, r.rejected
        if self._edge is not None:
            received, rejected = received + self._edge.received, rejected + self._edge.rejected
        yield _counter(
            "flyball_received_events", "Events decoded and appended, copies included.", "format", received
        )
        yield _counter(
            "flyball_rejected_events",
            "Events that could not be taken; they are in the dead letters.",
            "reason",
            rejected,
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


def exposition(runtime: Embedded, edge: Edge[Any] | None = None) -> bytes:
    return page([RuntimeCollector(runtime, edge), *(edge.metrics() if edge is not None else ())])


def page(collectors: Iterable[Collector]) -> bytes:
    """The metrics of these, in the Prometheus text format."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry)
