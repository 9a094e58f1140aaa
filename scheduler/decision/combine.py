"""Scores to one order: tier by tier, then by name. Invariant: the order is strict, so nobody else ever breaks a tie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from policies.columns import FloatArray

Rows = npt.NDArray[np.intp]


def tier_sum(scores: Sequence[tuple[float, FloatArray]]) -> FloatArray:
    """Return the weighted mean of one tier's scores.

    Args:
        scores: at least one pair of weight (> 0) and `[N]` scores in 0..1.

    Returns:
        ``[N]`` 0..1.
    """
    if len(scores) == 1:
        return scores[0][1]
    total = sum(weight for weight, _ in scores)
    mean = np.zeros_like(scores[0][1])
    for weight, score in scores:
        mean += np.float32(weight / total) * score
    return mean


def best(tiers: Iterable[FloatArray], rank: npt.NDArray[np.int32], rows: Rows, count: int = 1) -> Rows:
    """Return the best rows, best first: larger tier sums first, tier by tier, then the smaller rank.

    For one row the field is narrowed tier by tier, and tiers that are not needed are never computed; for more it is
    sorted. Both name the same first row.

    Args:
        tiers: `[N]` tier sums, first tier first; may be a generator, it is read as far as needed.
        rank: ``[N]`` distinct among `rows`.
        rows: candidates, in any order; may be empty.
        count: how many to return, at least 1.
    """
    if count > 1:
        keys = [rank[rows], *(-tier[rows] for tier in reversed(list(tiers)))]
        return rows[np.lexsort(keys)][:count]
    for tier in tiers if len(rows) > 1 else ():
        values = tier[rows]
        rows = rows[values == values.max()]
        if len(rows) == 1:
            break
    return rows[np.argsort(rank[rows])][:1]


def scored(best: Sequence[str], offered: Sequence[str]) -> list[tuple[str, int]]:
    """Return the offered names with scores 0..10: 10 for the first of `best` alone, 0 for those not in it."""
    last = max(len(best) - 1, 1)
    scores = {name: 9 * (last - place_) // last if place_ else 10 for place_, name in enumerate(best)}
    return [(name, scores.get(name, 0)) for name in offered]
