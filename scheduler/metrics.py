"""Tessera's own metrics, for Prometheus: cluster-level sums with closed label sets, never a pod or a uid.

Gauges are computed from the live state when somebody scrapes, so no second counter can disagree with the ledger.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from policies.columns import Health, Mode, Use
from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.model.reservation import State

BUCKETS = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.8, 1.5)
VERBS = ("filter", "prioritize", "bind")


class Metrics:
    """Counters and histograms that handlers touch, and gauges read from the desk at a scrape."""

    def __init__(self, clock: Clock, version: str) -> None:
        """Make a registry of its own, so that several Tesseras may live in one process."""
        self._clock = clock
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "tessera_extender_request_duration_seconds",
            "Time to answer kube-scheduler.",
            ["verb"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._requests = Counter(
            "tessera_extender_requests", "Answers to kube-scheduler.", ["verb", "code"], registry=self.registry
        )
        self._rejections = Counter(
            "tessera_filter_rejections", "Pods refused by /filter, by reason.", ["reason"], registry=self.registry
        )
        self._reasons: dict[str, Counter] = {}
        self._timers = {verb: self._seconds.labels(verb) for verb in VERBS}
        self.version = version
        self._gauges: _Gauges | None = None

    @contextmanager
    def timed(self, verb: str) -> Generator[None, None, None]:
        """Measure one answer."""
        started = self._clock.monotonic()
        try:
            yield
        finally:
            self._timers[verb].observe(self._clock.monotonic() - started)

    def answered(self, verb: str, code: str) -> None:
        """Count one answer: ok, refused, error or malformed."""
        self._requests.labels(verb, code).inc()

    def rejected(self, reason: str) -> None:
        """Count one refusal; the reason is a word of the closed vocabulary."""
        known = self._reasons.get(reason)
        if known is None:
            known = self._reasons[reason] = self._rejections.labels(reason)
        known.inc()

    def watch(self, desk: Desk, age_s: Callable[[], float], findings: Callable[[], list[str]]) -> None:
        """Register the gauges that are read from live state; the two callables give age and audit findings."""
        self._gauges = _Gauges(desk, age_s, findings, self.version)
        self.registry.register(self._gauges)

    def refresh(self) -> None:
        """Read the gauges from the live state; only the thread that owns the state may call it."""
        if self._gauges is not None:
            self._gauges.kept = list(self._gauges.read())

    def render(self) -> bytes:
        """Return the exposition text with the gauges as last refreshed; any thread may call it."""
        return generate_latest(self.registry)


class _Gauges:
    def __init__(self, desk: Desk, age_s: Callable[[], float], findings: Callable[[], list[str]], version: str) -> None:
        self._desk, self._age_s, self._findings, self._version = desk, age_s, findings, version
        self.kept: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return self.kept

    def read(self) -> Iterable[Metric]:
        build = GaugeMetricFamily("tessera_build_info", "Version of the running Tessera.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield GaugeMetricFamily(
            "tessera_inventory_age_seconds", "Time since the API server was last heard.", value=self._age_s()
        )
        yield GaugeMetricFamily("tessera_drift_devices", "Findings of the last audit.", value=len(self._findings()))
        yield self._gpus()
        depth = GaugeMetricFamily("tessera_requests", "Requests in the ledger by state.", labels=["state"])
        tally = Tally(row.state for row in self._desk.book.live())
        for state in State:
            depth.add_metric([state.value.lower()], tally.get(state, 0))
        yield depth

    def _gpus(self) -> Metric:
        family = GaugeMetricFamily("tessera_gpus", "GPUs by model and state.", labels=["model", "state"])
        snapshot, names = self._desk.registry.snapshot(), self._desk.registry.columns.models.names
        totals: Tally[tuple[str, str]] = Tally()
        exact = snapshot.mode == Mode.EXACT
        used = np.maximum(snapshot.gpus_total - snapshot.gpus_free, 0)
        for code, name in enumerate(names):
            ours = snapshot.exists & (snapshot.model == code)
            if not ours.any():
                continue
            model = name.partition("|")[0] or "unknown"
            sick = ours & (snapshot.health != Health.HEALTHY)
            taken = int((ours & ~sick & exact & (snapshot.use != Use.FREE)).sum())
            observed = ours[:, ~exact].any(axis=0)
            taken += int(used[~exact][observed].sum())
            totals[model, "unhealthy"] += int(sick.sum())
            totals[model, "allocated"] += taken
            totals[model, "free"] += int(ours.sum()) - int(sick.sum()) - taken
        for (model, state), count in sorted(totals.items()):
            family.add_metric([model, state], count)
        return family
