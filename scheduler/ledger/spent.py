"""What each queue has used over time, decayed: a fold over the journal, so the same lines give the same numbers. Pure.

It counts what the lines themselves tell: cpu, memory, whole GPUs, MIG instances and shares; not models, which only the
node knows. Looking changes nothing, so it does not matter how often, or on which machine, somebody looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from policies.ordering import decayed
from scheduler.intake.allocation import read_allocation
from scheduler.model.queue import GPU_KEY
from scheduler.model.reservation import Entry, Row

from .charges import charge_of_allocation
from .lifecycle import HOLDING

PAST = 20

DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Flow:
    """One key of one queue: its decayed usage in millionths at a time, and what has been held since."""

    value: int = 0
    rate: int = 0
    at_us: int = 0

    def to(self, at_us: int, half_life_us: int) -> Flow:
        """Return the same at another time; a time that lies before counts as the same."""
        value = decayed(self.value, self.rate, at_us - self.at_us, half_life_us)
        return Flow(value, self.rate, max(at_us, self.at_us))


class Spent:
    """The decayed usage of all queues. Feed it every line of the journal in order, from the first one that matters.

    What is older than `PAST` half-lives is below a millionth: a fold may begin there, with the rows that hold something
    since before.
    """

    def __init__(self, half_life_us: int = DAY_US) -> None:
        """Start with nothing spent."""
        assert half_life_us > 0, "a half-life is longer than nothing"
        self.half_life_us = half_life_us
        self._flows: dict[str, dict[str, Flow]] = {}
        self._held: dict[str, tuple[str, dict[str, int]]] = {}  # by request: queue and charge

    def note(self, entry: Entry) -> None:
        """Take in a transition that has been committed."""
        amounts = (entry.allocation, entry.gpu_milli, entry.cpu_milli, entry.memory_mib)
        self._note(entry.target in HOLDING, entry.request, entry.queue, entry.at, amounts)

    def note_line(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the journal."""
        self._note(
            line["to"] in HOLDING,
            line["request"],
            line["queue"],
            line["at"],
            (line["allocation"], line["gpu_milli"], line["cpu_milli"], line["memory_mib"]),
        )

    def note_row(self, row: Row, since_us: int) -> None:
        """Take in a row that holds something since before the first line; `since_us` is when the fold begins."""
        self._note(True, row.id, row.queue, since_us, (row.allocation, row.gpu_milli, row.cpu_milli, row.memory_mib))  # noqa: FBT003

    def used(self, queue: str, now_us: int) -> dict[str, int]:
        """Return a queue's decayed usage by key, in millionths, as `policies.ordering.share_milli` takes it."""
        flows = self._flows.get(queue, {})
        return {key: flow.to(now_us, self.half_life_us).value for key, flow in sorted(flows.items())}

    def _note(self, holds: bool, request: str, queue: str, at_us: int, amounts: tuple[str, int, int, int]) -> None:  # noqa: FBT001
        if holds is (request in self._held):
            return
        if holds:
            charge = _charge(*amounts)
            self._held[request] = queue, charge
            self._change(queue, charge, at_us, 1)
        else:
            then, charge = self._held.pop(request)
            self._change(then, charge, at_us, -1)

    def _change(self, queue: str, charge: Mapping[str, int], at_us: int, sign: int) -> None:
        flows = self._flows.setdefault(queue, {})
        for key, amount in charge.items():
            flow = flows.get(key, Flow(at_us=at_us)).to(at_us, self.half_life_us)
            flows[key] = replace(flow, rate=flow.rate + sign * amount)


def _charge(allocation: str, gpu_milli: int, cpu_milli: int, memory_mib: int) -> dict[str, int]:
    """Return what a Request holds; one that was found bound without an allocation counts the GPUs it asked."""
    charge = charge_of_allocation(cpu_milli, memory_mib, read_allocation(allocation))
    return charge if allocation or gpu_milli < 1000 else {**charge, GPU_KEY: gpu_milli // 1000}  # noqa: PLR2004 - one GPU
