"""Tessera's own metrics, for Prometheus: cluster-level sums with closed label sets, never a pod or a uid.

Gauges are computed from the live state when somebody scrapes, so no second counter can disagree with the ledger.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric

from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.gauges import breakers, capacity, fragmentation, gauge, line
from scheduler.ledger.lifecycle import TERMINAL
from scheduler.model.reservation import Change, Event, State
from scheduler.settling import Writer

BUCKETS = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.8, 1.5)
NOTICED = ("sent", "dropped", "failed")
VERBS = ("filter", "prioritize", "bind")
OUTCOMES = {
    Event.POST: "bound",
    Event.ADOPT: "adopted",
    Event.VOID: "voided",
    Event.FINISH: "released",
    Event.FAIL: "failed",
    Event.EXPIRE: "expired",
    Event.CANCEL: "cancelled",
    Event.REJECT: "rejected",
}
"""What the ledger's events mean for an allocation: `bound` and `adopted` begin one, the others end or prevent one."""


class Metrics:
    """Counters and histograms that handlers touch, and gauges read from the desk at a scrape."""

    def __init__(self, clock: Clock, version: str) -> None:
        """Make a registry of its own, so that several Tesseras may live in one process."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # half of the series, and nobody reads them
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
        self._outcomes = Counter(
            "tessera_allocations", "Allocations begun, ended and prevented.", ["outcome"], registry=self.registry
        )
        events = Counter(
            "tessera_pod_events",
            "Events about waiting pods, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        self._events = {outcome: events.labels(outcome) for outcome in NOTICED}
        self._reasons: dict[str, Counter] = {}
        self._answers: dict[tuple[str, str], Counter] = {}
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
        known = self._answers.get((verb, code))
        if known is None:
            known = self._answers[verb, code] = self._requests.labels(verb, code)
        known.inc()

    def rejected(self, reason: str) -> None:
        """Count one refusal; the reason is a word of the closed vocabulary."""
        known = self._reasons.get(reason)
        if known is None:
            known = self._reasons[reason] = self._rejections.labels(reason)
        known.inc()

    def noticed(self, outcome: str) -> None:
        """Count one Event about a waiting pod: sent, dropped or failed."""
        self._events[outcome].inc()

    def counting(self, writer: Writer) -> Writer:
        """Return the ledger's writer with a counter of what it committed."""
        return _Counting(writer, self._outcomes)

    def watch(self, desk: Desk, age_s: Callable[[], float], findings: Callable[[], list[str]]) -> None:
        """Register the gauges that are read from live state; the two callables give age and audit findings."""
        self._gauges = _Gauges(desk, age_s, findings, self.version)
        self.registry.register(self._gauges)

    async def refresh(self) -> None:
        """Read the gauges from the live state, on the loop that owns it; lets others run after each of them."""
        if self._gauges is not None:
            read: list[Metric] = []
            for metric in self._gauges.read():
                if metric is not None:
                    read.append(metric)
                await self._clock.sleep(0)
            self._gauges.kept = read

    def render(self) -> bytes:
        """Return the exposition text with the gauges as last refreshed; any thread may call it."""
        return generate_latest(self.registry)


class _Counting:
    """A ledger's writer that counts what became durable."""

    def __init__(self, writer: Writer, outcomes: Counter) -> None:
        self._writer = writer
        self._children = {event: outcomes.labels(word) for event, word in OUTCOMES.items()}

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Commit, then count."""
        await self._writer.commit(changes)
        for change in changes:
            if (child := self._children.get(change.entry.event)) is not None:
                child.inc()

    async def close(self) -> None:
        """Close the writer."""
        await self._writer.close()


class _Gauges:
    def __init__(self, desk: Desk, age_s: Callable[[], float], findings: Callable[[], list[str]], version: str) -> None:
        self._desk, self._age_s, self._findings, self._version = desk, age_s, findings, version
        self.kept: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return self.kept

    def read(self) -> Iterable[Metric | None]:
        """Yield the gauges, and None where others may run in the midst of one."""
        yield gauge("build_info", "Version of the running Tessera.", ("version",), {(self._version,): 1})
        yield gauge("inventory_age_seconds", "Time since the API server was last heard.", (), {(): self._age_s()})
        yield from breakers(self._desk.dependencies)
        yield gauge("drift_devices", "Findings of the last audit.", (), {(): len(self._findings())})
        yield from capacity(self._desk.registry)
        yield from fragmentation(self._desk.registry, self._desk.mix)
        yield from line(self._desk)
        tally = Tally(row.state for row in self._desk.book.rows.values())
        states: dict[tuple[str, ...], float] = {
            (state.value.lower(),): tally.get(state, 0) for state in State if state not in TERMINAL
        }
        yield gauge("requests", "Requests that are not over, by state.", ("state",), states)
