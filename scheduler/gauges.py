"""Gauges read from the live state at a scrape: what there is, what is taken, what is stranded, and who waits.

Invariant: whatever nodes and queues are called, there are at most `MODELS_MAX` models, `PROFILES_MAX` profiles and
`QUEUES_MAX` queues in the labels; the rest together is `other`. Only the thread that owns the state may read.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from policies.columns import BoolArray, Health, Mix, Mode, Snapshot, Use
from policies.fragmentation import expected_fragment
from scheduler import GPU
from scheduler.breaker import Phase
from scheduler.decision.reasons import REASONS
from scheduler.dependencies import Dependencies
from scheduler.desk import Desk
from scheduler.inventory.registry import Booking, Registry, Source
from scheduler.model.reservation import Row, State
from scheduler.waiting import waiting_word

MODELS_MAX, PROFILES_MAX, QUEUES_MAX = 40, 60, 300
OTHER = "other"
STATES = ("allocated", "free", "reserved", "unhealthy", "draining")
CAUSES = ("cordoned", "unnamed", "cpu", "memory", "pods")
LEAST_CPU_MILLI, LEAST_MEMORY = 1000, 1 << 30
"""A node with less than one core or one GiB left hardly takes another GPU pod: its free GPUs are stranded."""

NODES_AT_ONCE = 512
"""Nodes whose fragment is looked at before others may run: about a millisecond."""

Counts = npt.NDArray[np.int64]


def gauge(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    """Return a family `tessera_<name>` with one sample per tuple of label values."""
    family = GaugeMetricFamily(f"tessera_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def breakers(behind: Dependencies) -> Iterator[Metric]:
    """Yield in which phase each breaker is, and how often it came into each."""
    both = (behind.store, behind.api)
    now: dict[tuple[str, ...], float] = {(one.name, phase.value): phase is one.phase for one in both for phase in Phase}
    yield gauge("breaker_state", "1 for the phase in which a dependency's breaker is.", ("dependency", "state"), now)
    text, labels = "How often a dependency's breaker came into a phase.", ("dependency", "to")
    turns = CounterMetricFamily("tessera_breaker_transitions", text, labels=labels)
    for one in both:
        for phase in Phase:
            turns.add_metric((one.name, phase.value), one.transitions[phase])
    yield turns


def kept(totals: Mapping[str, float], most: int) -> dict[str, str]:
    """Return the label of each name: its own for the `most` largest (equal ones by name), `other` for the rest."""
    order = sorted(totals, key=lambda name: (-totals[name], name))
    return {name: name if place < most else OTHER for place, name in enumerate(order)}


@dataclass(frozen=True, slots=True)
class _Devices:
    """The GPUs of one model per node, `[N]` each."""

    total: Counts
    unhealthy: Counts
    draining: Counts
    used: Counts
    reserved: Counts

    @property
    def free(self) -> Counts:
        return self.total - self.unhealthy - self.draining - self.used

    def states(self) -> tuple[int, ...]:
        """Return the sums in the order of STATES."""
        parts = (self.used - self.reserved, self.free, self.reserved, self.unhealthy, self.draining)
        return tuple(int(part.sum()) for part in parts)


def capacity(registry: Registry) -> Iterable[Metric]:
    """Yield GPUs by model and state, free GPUs that nothing can use by cause, MIG slices, and what was passed over."""
    snapshot = registry.snapshot()
    causes = _causes(registry, snapshot)
    states: Tally[tuple[str, str]] = Tally()
    stranded: Tally[tuple[str, str]] = Tally()
    for model, devices in _models(registry, snapshot):
        states.update({(model, state): count for state, count in zip(STATES, devices.states(), strict=True)})
        free = devices.free
        for cause, there in causes.items():
            stranded[model, cause] += int(free[there].sum())
    names = kept(Tally({model: sum(states[model, state] for state in STATES) for model, _ in states}), MODELS_MAX)
    yield gauge("gpus", "GPUs by model and state.", ("model", "state"), _relabelled(states, names))
    text = "Free GPUs on nodes that can hardly take a pod, by what is lacking."
    yield gauge("gpu_stranded", text, ("model", "cause"), _relabelled(stranded, names))
    yield _instances(registry, snapshot)
    text = "Objects that are there and could not be taken in; the log names each."
    kinds = Tally(kind for kind, _ in registry.poison)
    yield gauge("poison_objects", text, ("kind",), {(kind,): kinds[kind] for kind in ("nodes", "pods")})


def fragmentation(registry: Registry, mix: Callable[[], Mix]) -> Iterator[Metric | None]:
    """Yield what part of the free GPUs is of no use for requests like those of late; None where others may run first.

    A node counts for the model of its first device.
    """
    snapshot, models = registry.snapshot(), registry.columns.models.names
    gpus, useless, idle = Tally[str](), Tally[str](), Tally[str]()
    for start in range(0, snapshot.nodes if snapshot.slots else 0, NODES_AT_ONCE):
        some = snapshot.take(slice(start, start + NODES_AT_ONCE))
        first = np.take_along_axis(some.model, some.exists.argmax(axis=0)[None], axis=0)[0]
        lost, free = expected_fragment(some, mix())  # asked for anew: a model that came meanwhile must be in it
        for code in np.unique(first[some.exists.any(axis=0)]).tolist():
            here = first == code
            model = models[code].partition("|")[0] or "unknown"
            gpus[model] += int(some.exists[:, here].sum())
            useless[model] += int(lost[here].sum())
            idle[model] += int(free[here].sum())
        yield None
    names = kept(gpus, MODELS_MAX)
    lost_by, free_by = (_summed(milli, names) for milli in (useless, idle))
    text = "Part of the free GPUs that requests like those of late could not use, 0 to 1; 0 while none came."
    ratios: dict[tuple[str, ...], float] = {
        (name,): lost_by[name] / free if free else 0.0 for name, free in free_by.items()
    }
    yield gauge("gpu_fragmentation_ratio", text, ("model",), ratios)


def _summed(counts: Mapping[str, int], names: Mapping[str, str]) -> Tally[str]:
    summed: Tally[str] = Tally()
    for name, count in counts.items():
        summed[names[name]] += count
    return summed


def line(desk: Desk) -> Iterable[Metric]:
    """Yield how many wait, how many of them without a gate, and how long the first has waited, by queue.

    The class says who must act.
    """
    depth: Tally[tuple[str, str]] = Tally()
    direct = 0
    oldest: dict[str, int] = {}
    for row in desk.book.rows.values():
        if row.state in {State.HELD, State.QUEUED}:
            depth[row.queue, _class(desk, row)] += 1
            pod = desk.registry.pods.get(row.id)
            direct += pod is not None and not pod.gates
            oldest[row.queue] = min(row.arrival_us, oldest.get(row.queue, row.arrival_us))
    totals: Tally[str] = Tally()
    for (queue, _), count in depth.items():
        totals[queue] += count
    names = kept(totals, QUEUES_MAX)
    yield gauge("queue_depth", "Requests that wait.", ("queue", "class"), _relabelled(depth, names))
    text = "Pods without a gate that wait: kube-scheduler tries each of them again at nearly every event."
    yield gauge("direct_pods_waiting", text, (), {(): direct})
    now_us = desk.clock.wall_us()
    ages: dict[tuple[str, ...], float] = {(name,): 0.0 for name in names.values()}
    for queue, arrival_us in oldest.items():
        ages[names[queue],] = max(ages[names[queue],], (now_us - arrival_us) / 1_000_000)
    yield gauge("queue_oldest_seconds", "Age of the request that has waited longest.", ("queue",), ages)


def _class(desk: Desk, row: Row) -> str:
    """Return who must act for a waiting request, as far as the last turn or refusal tells; else nobody need."""
    reason = REASONS.get(waiting_word(desk, row))
    return reason.who if reason else "wait"


def _relabelled(counts: Mapping[tuple[str, str], int], names: Mapping[str, str]) -> dict[tuple[str, ...], float]:
    summed: Tally[tuple[str, ...]] = Tally()
    for (name, second), count in sorted(counts.items()):
        summed[names[name], second] += count
    return dict(summed)


def _models(registry: Registry, snapshot: Snapshot) -> Iterator[tuple[str, _Devices]]:
    """Yield each model's devices; on observed nodes NVIDIA's plugin knows which are used, and here only how many."""
    exact, ok = snapshot.mode == Mode.EXACT, snapshot.health == Health.HEALTHY
    tokens = np.maximum(snapshot.gpus_total - snapshot.gpus_free, 0)
    draining = snapshot.health == Health.DRAINING
    reserved = _reserved(registry, snapshot)
    for code, name in enumerate(registry.columns.models.names):
        ours = snapshot.exists & (snapshot.model == code)
        if not ours.any():
            continue
        total, good = ours.sum(axis=0), (ours & ok).sum(axis=0)
        used = np.where(exact, (ours & ok & (snapshot.use != Use.FREE)).sum(axis=0), np.minimum(tokens, good))
        drained = (ours & draining).sum(axis=0)
        yield (
            name.partition("|")[0] or "unknown",
            _Devices(total, total - good - drained, drained, used, np.minimum((ours * reserved).sum(axis=0), used)),
        )


def _reserved(registry: Registry, snapshot: Snapshot) -> npt.NDArray[np.int64]:
    """Return `[D, N]` 1 where a device is kept for a pod that is not bound yet; which one is a guess where observed."""
    found = np.zeros(snapshot.exists.shape, np.int64)
    for held in _unbound(registry):
        row = registry.columns.rows.get(held.node)
        if row is None:
            continue
        slots = [slot for slot, _ in held.devices if slot < snapshot.slots]
        if not slots and snapshot.mode[row] == Mode.OBSERVED:
            count = sum(number for resource, number in held.tokens if resource == GPU)
            slots = np.flatnonzero(snapshot.exists[:, row] & (found[:, row] == 0))[:count].tolist()
        found[slots, row] = 1
    return found


def _unbound(registry: Registry) -> Iterator[Booking]:
    bound = {uid for uid, _ in registry.said(Source.OBSERVED)}
    claimed = {uid: held for uid, held in registry.said(Source.CLAIMED) if uid not in bound}
    yield from claimed.values()
    yield from (held for uid, held in registry.said(Source.INTENDED) if uid not in bound and uid not in claimed)


def _causes(registry: Registry, snapshot: Snapshot) -> dict[str, BoolArray]:
    """Return per cause, `[N]`, the nodes that lack it; a node counts for the first cause only."""
    cordoned = np.zeros(snapshot.nodes, np.bool_)
    cordoned[[registry.columns.rows[name] for name, node in registry.nodes.items() if node.unschedulable]] = True
    lacking = {
        "cordoned": cordoned,
        "unnamed": snapshot.foreign,
        "cpu": snapshot.cpu_milli_free < LEAST_CPU_MILLI,
        "memory": snapshot.memory_bytes_free < LEAST_MEMORY,
        "pods": snapshot.pods_free <= 0,
    }
    assert tuple(lacking) == CAUSES
    before = np.zeros(snapshot.nodes, np.bool_)
    found: dict[str, BoolArray] = {}
    for cause, there in lacking.items():
        found[cause] = there & ~before
        before = before | there
    return found


def _instances(registry: Registry, snapshot: Snapshot) -> Metric:
    """Count MIG instances: what observed nodes offer, and what is held on exact ones, where none is there unused."""
    offered: Tally[str] = Tally()
    held: Tally[str] = Tally()
    for name, node in registry.nodes.items():
        if node.mode is Mode.OBSERVED:
            offered.update(dict(node.slices))
        elif any(device.mig_mode for device in node.devices):
            parts = (part for booking in registry.holders(name).values() for part in booking.parts)
            held.update(part.profile for part in parts if part.profile)
    left = np.maximum(snapshot.slices_free[:, snapshot.mode == Mode.OBSERVED], 0).sum(axis=1)
    counts: dict[tuple[str, str], int] = {}
    totals = offered + held
    for profile, total in totals.items():
        free = min(int(left[registry.columns.profiles.find(profile)]), offered[profile])
        counts[profile, "free"], counts[profile, "allocated"] = free, total - free
    labels = ("profile", "state")
    return gauge("mig_instances", "MIG instances.", labels, _relabelled(counts, kept(totals, PROFILES_MAX)))
