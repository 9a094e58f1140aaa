"""What a waiting request could change to be admitted now: single changes, each judged on the whole cluster.

None is a promise: others may come first. Invariant: every idea was judged as the request would be with it, the work is
bounded (`JUDGED_MAX` judgements, `ROWS_MAX` nodes compared with the selection), and nothing is remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import numpy as np

from policies.columns import BoolArray, Kind
from scheduler.inventory.registry import Registry
from scheduler.inventory.selection import obstacles
from scheduler.model.pod import Amounts, Request
from scheduler.model.queue import CPU_KEY, MEMORY_KEY, written

ROWS_MAX = 4096
TRIED_MAX, SHOWN_MAX = 6, 3  # models, profiles, selector terms
JUDGED_MAX = 100
CHANGE_MAX = 300  # characters: names come from pods and nodes
CPU_STEP_MILLI, MEMORY_STEP, SHARE_STEP_MIB, SHARE_STEP_MILLI = 100, 256 << 20, 256, 10
MIB = 1 << 20
_DEVICES = {Kind.WHOLE: "GPUs", Kind.MIG: "MIG slices", Kind.SHARE: "shares"}


class Idea(TypedDict):
    """One change and on how many nodes the request would be admitted with it."""

    change: str
    nodes: int


class Fits(Protocol):
    """Where a changed request would be admitted now: ``[N]``; `everywhere` leaves out what its selection says.

    For a gang: where its pods would be, each changed alike; nowhere where they would not all be admitted.
    """

    def __call__(self, request: Request, /, *, everywhere: bool = False) -> BoolArray:
        """Judge it."""
        ...


@dataclass(slots=True)
class Case:
    """A waiting request, and what says where a changed one would be admitted.

    Attributes:
        profiles: legal MIG profiles, those most like the one asked first.
        left: judgements that may still be made.
    """

    request: Request
    registry: Registry
    profiles: tuple[str, ...]
    fits: Fits
    left: int = JUDGED_MAX

    def nodes(self, request: Request) -> int:
        """Return on how many nodes a changed request would be admitted; 0 when enough was judged."""
        return int(self.rows(request).sum())

    def rows(self, request: Request, *, everywhere: bool = False) -> BoolArray:
        """Return ``[N]`` where a changed request would be admitted."""
        self.left -= 1
        if self.left < 0:
            return np.zeros(self.registry.snapshot().nodes, np.bool_)
        return self.fits(request, everywhere=everywhere)

    def largest(self, most: int, make: Callable[[int], Request]) -> int:
        """Return the largest number from 1 to `most` with which it would be admitted; 0 = none. Less is never worse."""
        low, high = 0, most + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.nodes(make(middle)) else (low, middle)
        return low

    def asking(self, **changed: object) -> Request:
        """Return the request with other devices."""
        return replace(self.request, devices=replace(self.request.devices, **changed))  # type: ignore[arg-type]


def ideas(request: Request, registry: Registry, profiles: tuple[str, ...], fits: Fits) -> list[Idea]:
    """Return the single changes that would let the request be admitted somewhere now; none when it would be as it is.

    Args:
        request: that waits.
        registry: of the nodes.
        profiles: legal MIG profiles, those most like the one asked first.
        fits: judges a changed request.
    """
    case = Case(request, registry, profiles, fits)
    if case.nodes(request):
        return []
    found: list[Idea] = []
    for way in (_fewer, _model, _profile, _smaller, _less, _elsewhere):
        found += [
            {"change": text[:CHANGE_MAX], "nodes": nodes}
            for text, changed in way(case)
            if (nodes := changed if isinstance(changed, int) else case.nodes(changed))
        ]
    return found


def _fewer(case: Case) -> Iterator[tuple[str, Request]]:
    devices = case.request.devices
    if devices.kind is Kind.NONE or (devices.kind is Kind.SHARE and len(devices.containers) > 1):
        return

    def asking(count: int) -> Request:
        containers = tuple(replace(each, count=count) for each in devices.containers)
        return case.asking(count=count, containers=containers if len(containers) == 1 else devices.containers)

    if count := case.largest(devices.count - 1, asking):
        yield f"ask for {count} instead of {devices.count} {_DEVICES[devices.kind]}", asking(count)


def _model(case: Case) -> Iterator[tuple[str, Request]]:
    if not case.request.devices.models:
        return
    anywhere = case.rows(case.asking(models=()))
    if not anywhere.any():
        return
    yield "take any GPU model", case.asking(models=())
    snapshot, names = case.registry.snapshot(), case.registry.columns.models.names
    there = snapshot.model[:, anywhere][snapshot.exists[:, anywhere]]
    codes, counts = np.unique(there, return_counts=True)
    models = [names[code].partition("|")[0] for code in codes[np.argsort(-counts, kind="stable")].tolist()]
    for model in list(dict.fromkeys(filter(None, models)))[:SHOWN_MAX]:
        yield f"take GPU model {model}", case.asking(models=(model.lower(),))


def _profile(case: Case) -> Iterator[tuple[str, Request]]:
    devices = case.request.devices
    if devices.kind is not Kind.MIG:
        return
    known = dict.fromkeys([*case.profiles, *filter(None, case.registry.columns.profiles.names)])
    known.pop(devices.profile, None)
    for profile in list(known)[:TRIED_MAX]:
        yield f"ask for profile {profile} instead of {devices.profile}", case.asking(profile=profile)


def _smaller(case: Case) -> Iterator[tuple[str, Request]]:
    devices = case.request.devices
    if devices.kind is not Kind.SHARE:
        return

    def memory(steps: int) -> Request:
        return case.asking(memory_mib=steps * SHARE_STEP_MIB)

    def milli(steps: int) -> Request:
        return case.asking(milli=steps * SHARE_STEP_MILLI)

    if steps := case.largest((devices.memory_mib - 1) // SHARE_STEP_MIB, memory):
        text = f"ask for gpu-memory {steps * SHARE_STEP_MIB}Mi instead of {devices.memory_mib}Mi per share"
        yield text, memory(steps)
    if steps := case.largest((devices.milli - 1) // SHARE_STEP_MILLI, milli):
        yield f"ask for gpu-milli {steps * SHARE_STEP_MILLI} instead of {devices.milli} per share", milli(steps)


def _less(case: Case) -> Iterator[tuple[str, Request]]:
    request, amounts = case.request, case.request.amounts

    def asking(cpu_milli: int, memory_bytes: int) -> Request:
        return replace(request, amounts=replace(amounts, cpu_milli=cpu_milli, memory_bytes=memory_bytes))

    def cpu(steps: int) -> Request:
        return asking(steps * CPU_STEP_MILLI, amounts.memory_bytes)

    def memory(steps: int) -> Request:
        return asking(amounts.cpu_milli, steps * MEMORY_STEP)

    def both(percent: int) -> Request:
        cpu_milli = amounts.cpu_milli * percent // (100 * CPU_STEP_MILLI) * CPU_STEP_MILLI
        return asking(cpu_milli, amounts.memory_bytes * percent // (100 * MEMORY_STEP) * MEMORY_STEP)

    if not case.nodes(asking(0, 0)):
        return
    cores = case.largest((amounts.cpu_milli - 1) // CPU_STEP_MILLI, cpu)
    if cores:
        yield f"ask for {_cpu(cores * CPU_STEP_MILLI)} instead of {_cpu(amounts.cpu_milli)} CPU", cpu(cores)
    parts = case.largest((amounts.memory_bytes - 1) // MEMORY_STEP, memory)
    if parts:
        shown = f"{_memory(parts * MEMORY_STEP)} instead of {_memory(amounts.memory_bytes)}"
        yield f"ask for {shown} of memory", memory(parts)
    if not cores and not parts and (percent := case.largest(99, both)):
        yield f"ask for {_both(both(percent).amounts)} instead of {_both(amounts)}", both(percent)


def _elsewhere(case: Case) -> Iterator[tuple[str, int]]:
    """Yield what of the selection to give up, where just one part of it keeps the request from a node."""
    names, nodes = case.registry.columns.names, case.registry.nodes
    alone: Counter[str] = Counter()
    for row in np.flatnonzero(case.rows(case.request, everywhere=True))[:ROWS_MAX].tolist():
        found = obstacles(case.request.selection, nodes[names[row]])
        if len(found) == 1 and found[0]:
            alone[found[0]] += 1
    yield from sorted(alone.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN_MAX]


def _cpu(milli: int) -> str:
    return str(written(CPU_KEY, milli))


def _memory(amount: int) -> str:
    return str(written(MEMORY_KEY, -(-amount // MIB)))


def _both(amounts: Amounts) -> str:
    return f"{_cpu(amounts.cpu_milli)} CPU and {_memory(amounts.memory_bytes)} of memory"
