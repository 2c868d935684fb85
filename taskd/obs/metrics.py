"""Every metric of taskd in one table, and the holder of a process' figures.

A new metric is one line in `METRICS`. Its name and labels are public once released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: what it counts, in whose words, by which labels."""

    name: str
    help: str
    kind: Literal["counter", "gauge"] = "counter"
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("taskd_claimed_total", "Jobs claimed by this node.", labels=("type",)),
    Metric("taskd_fenced_total", "Late writes of older claims that were refused."),
    Metric("taskd_http_requests_total", "HTTP requests answered.", labels=("route", "status")),
    Metric("taskd_listener_lost_total", "Times at which hints (NOTIFY) ceased to reach this node."),
    Metric("taskd_listener_up", "1 while hints (NOTIFY) reach this node, 0 while it polls only.", "gauge"),
    Metric("taskd_notify_queue_usage", "Share of the server's NOTIFY queue that is in use, 0 to 1.", "gauge"),
    Metric(
        "taskd_oldest_snapshot_seconds",
        "Age of the oldest transaction, standby or slot that holds back vacuum (0: none that can be seen).",
        "gauge",
    ),
    Metric("taskd_put_back_total", "Jobs returned unrun, no attempt counted."),
    Metric("taskd_rescued_total", "Jobs taken from dead nodes."),
    Metric("taskd_respawns_total", "Child processes started again after their end."),
    Metric("taskd_settled_total", "Runs settled, by the status they left.", labels=("type", "status")),
)


class Metrics:
    """The figures of one process since its start. Owned by its event loop: no lock, no other thread."""

    def __init__(self, table: Iterable[Metric] = METRICS) -> None:
        self._table = {metric.name: metric for metric in table}
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        for metric in self._table.values():
            self._values[metric.name] = (
                {} if metric.labels else {(): 0}
            )  # a figure never counted is 0, not absent

    def inc(self, name: str, *labels: str, by: float = 1) -> None:
        """Add `by` to the figure of these label values, in the order of the table.

        Raises:
            KeyError: no such metric.
            ValueError: the number of labels is wrong.
        """
        self._put(name, labels, self._values[name].get(labels, 0) + by)

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge; raises as `inc` does."""
        self._put(name, labels, to)

    def get(self, name: str, *labels: str) -> float:
        """Return one figure; 0 if it was never counted."""
        return self._values[name].get(labels, 0)

    def render(self) -> str:
        """Return all figures in the text format of Prometheus, version 0.0.4."""
        lines = []
        for name, metric in sorted(self._table.items()):
            lines.append(f"# HELP {name} {_escape(metric.help)}")
            lines.append(f"# TYPE {name} {metric.kind}")
            for labels, value in sorted(self._values[name].items()):
                pairs = zip(metric.labels, labels, strict=True)
                inner = ",".join(f'{label}="{_quote(text)}"' for label, text in pairs)
                lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")
        return "\n".join(lines) + "\n"

    def _put(self, name: str, labels: tuple[str, ...], value: float) -> None:
        if len(labels) != len(self._table[name].labels):
            raise ValueError(f"{name} has the labels {self._table[name].labels}, not {labels}")
        self._values[name][labels] = value


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quote(text: str) -> str:
    return _escape(text).replace('"', '\\"')
