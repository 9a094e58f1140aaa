"""One decision: an ask meets a snapshot; masks say where it fits, scores where it fits best.

Invariant: a Verdict computes scores when first asked for, so on live columns it is used up before they change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from policies.columns import Ask, BoolArray, FloatArray, Mix, Snapshot

from . import combine
from .catalog import MASKS, REASONS, SCORES, TURN_MASKS, Policies, asks_of
from .combine import Rows

__all__ = ["Failed", "Policies", "Verdict", "judge"]


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """Where an ask fails, and at what first; texts are constants and never carry a number.

    Attributes:
        masks: those that were applied, in order.
        first: ``[N]`` int8 index into `masks` of the first failing one, -1 where none fails.
    """

    masks: tuple[str, ...]
    first: npt.NDArray[np.int8]

    def reasons(self, rows: Rows) -> list[str]:
        """Return the reason word of each of these nodes; empty where the node passes."""
        words = [*(REASONS[name] for name in self.masks), ""]
        return [words[index] for index in self.first[rows].tolist()]

    def headline(self, rows: Rows | None = None) -> str:
        """Return the one word for all these nodes: that of the mask furthest down the order, where the ask got closest.

        Empty when one of them passes; the first mask's word when there are none.
        """
        first = self.first if rows is None else self.first[rows]
        if len(first) and first.min() < 0:
            return ""
        return REASONS[self.masks[first.max(initial=0)]]


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What was found about one ask on every node of a snapshot."""

    snapshot: Snapshot
    ask: Ask
    mix: Mix
    policies: Policies
    failed: Failed
    known: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def passes(self) -> BoolArray:
        """``[N]`` True where all masks pass."""
        return self.failed.first < 0

    def score(self, name: str) -> FloatArray:
        """Return what one score says of every node; `[N]` 0..1, meaningful where the node passes."""
        known = self.known.get(name)
        if known is None:
            known = self.known[name] = SCORES[name](self.snapshot, self.ask, self.mix)
        return known

    def tiers(self) -> Iterator[FloatArray]:
        """Yield the tier sums, `[N]` each, computing each only when it is asked for."""
        for tier in self.policies.tiers:
            yield combine.tier_sum([(weight, self.score(name)) for name, weight in tier])

    def best(self, rows: Rows | None = None, count: int = 1) -> Rows:
        """Return up to `count` rows, best first, of those that pass; None = of all nodes."""
        passing = np.flatnonzero(self.passes) if rows is None else rows[self.passes[rows]]
        return combine.best(self.tiers(), self.snapshot.rank, passing, count)


def judge(snapshot: Snapshot, ask: Ask, mix: Mix, policies: Policies, masks: Collection[str] = TURN_MASKS) -> Verdict:
    """Judge an ask on every node with those of the policies' masks that are in `masks`."""
    names = tuple(name for name in policies.masks if name in masks)
    found = np.ones((len(names) + 1, snapshot.nodes), np.bool_)  # the last row fails, so that the first is always found
    found[-1] = False
    for index, name in enumerate(names):
        if ask.kind in asks_of(name):
            found[index] = MASKS[name](snapshot, ask, mix)
    first = found.argmin(axis=0).astype(np.int8)
    first[first == len(names)] = -1
    return Verdict(snapshot, ask, mix, policies, Failed(names, first))
