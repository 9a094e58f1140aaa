"""One decision: an ask meets a snapshot; masks say where it fits, scores where it fits best.

Invariant: a Verdict computes scores and reasons when they are first asked for, so it speaks for its snapshot only until
the columns change; whoever works on live columns uses it up before changing them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from policies.columns import Ask, BoolArray, FloatArray, Mix, Snapshot

from . import combine
from .catalog import MASKS, REASONS, SCORES, TURN_MASKS, Policies
from .combine import Rows

__all__ = ["Policies", "Verdict", "judge"]


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What was found about one ask on every node; texts are constants and never carry a number.

    Attributes:
        masks: those that were applied, in order.
        passes: ``[N]`` True where all masks pass.
    """

    snapshot: Snapshot
    ask: Ask
    mix: Mix
    policies: Policies
    masks: tuple[str, ...]
    passes: BoolArray
    _found: tuple[BoolArray, ...]  # by mask
    _failed: list[npt.NDArray[np.int8]] = field(default_factory=list)
    _scores: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def failed(self) -> npt.NDArray[np.int8]:
        """``[N]`` int8 index into `masks` of the first failing one, -1 where none fails."""
        if not self._failed:
            so_far = np.ones_like(self.passes)
            failed = np.zeros(so_far.shape, np.int8)  # counts masks passed in a row, which is that index
            for found in self._found:
                so_far &= found
                failed += so_far.view(np.int8)
            failed -= self.passes.view(np.int8) * np.int8(len(self.masks) + 1)
            self._failed.append(failed)
        return self._failed[0]

    def score(self, name: str) -> FloatArray:
        """Return what one score says of every node; `[N]` 0..1, meaningful where the node passes."""
        known = self._scores.get(name)
        if known is None:
            known = self._scores[name] = SCORES[name](self.snapshot, self.ask, self.mix)
        return known

    def tiers(self) -> Iterator[FloatArray]:
        """Yield the tier sums, `[N]` each, computing each only when it is asked for."""
        for tier in self.policies.tiers:
            yield combine.tier_sum([(weight, self.score(name)) for name, weight in tier])

    def best(self, rows: Rows | None = None, count: int = 1) -> Rows:
        """Return up to `count` rows, best first, of those that pass; None = of all nodes."""
        passing = np.flatnonzero(self.passes) if rows is None else rows[self.passes[rows]]
        return combine.best(self.tiers(), self.snapshot.rank, passing, count)

    def reasons(self, rows: Rows) -> list[str]:
        """Return the reason word of each of these nodes; empty where the node passes."""
        words = [*(REASONS[name] for name in self.masks), ""]
        return [words[index] for index in self.failed[rows].tolist()]

    def headline(self, rows: Rows | None = None) -> str:
        """Return the one word for all these nodes: that of the mask furthest down the order, where the ask got closest.

        Empty when one of them passes; the first mask's word when there are none.
        """
        failed = self.failed if rows is None else self.failed[rows]
        if len(failed) and failed.min() < 0:
            return ""
        return REASONS[self.masks[failed.max(initial=0)]]


def judge(snapshot: Snapshot, ask: Ask, mix: Mix, policies: Policies, masks: Collection[str] = TURN_MASKS) -> Verdict:
    """Judge an ask on every node with those of the policies' masks that are in `masks`."""
    names = tuple(name for name in policies.masks if name in masks)
    found = tuple(MASKS[name](snapshot, ask, mix) for name in names)
    passes = np.ones(snapshot.nodes, np.bool_)
    for mask in found:
        passes &= mask
    return Verdict(snapshot, ask, mix, policies, names, passes, found)
