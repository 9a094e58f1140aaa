"""The best of a few named nodes, judged without a look at the others: what /filter asks on every call.

Invariant: it names the same nodes in the same order as `judge(...).best(rows, count)`. Masks and most scores look at
one node at a time, so the columns they touch are gathered for the named nodes alone, and only those they touch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from policies.columns import COLUMN_DTYPES, Ask, BoolArray, FloatArray, Mix, Snapshot

from . import combine
from .catalog import MASKS, ONLY_FOR, SCORES, Policies
from .combine import Rows

CLUSTER_WIDE = frozenset({"keep-scarce", "fill-host"})
"""Scores that measure a node against the whole cluster; the others look at one node alone."""


class Near(Snapshot):
    """Some rows of a snapshot; a column is gathered when it is first read, so use it up before the columns change."""

    __slots__ = ("_rows", "_whole")

    def __init__(self, whole: Snapshot, rows: Rows | slice) -> None:
        """Note which rows; nothing is gathered."""
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_rows", rows)

    def __getattr__(self, name: str) -> object:
        if name not in COLUMN_DTYPES:
            raise AttributeError(name)
        column = getattr(self._whole, name)[..., self._rows]
        object.__setattr__(self, name, column)
        return column


def best_of(
    snapshot: Snapshot, rows: Rows, ask: Ask, mix: Mix, policies: Policies, *, masks: Collection[str], count: int = 1
) -> Rows:
    """Return up to `count` of the named rows that pass, best first.

    Args:
        snapshot: the whole cluster.
        rows: the named nodes; a node named twice counts once.
        ask: the request; its `allowed` is not looked at, for whoever names nodes has judged their place.
        mix: what scores may read.
        policies: their masks that are in `masks` apply, and all their scores.
        masks: none of them may be `allowed`.
        count: how many to return, at least 1.
    """
    rows = rows[_pass(Near(snapshot, rows), ask, mix, policies, masks)]
    if count == 1:
        return best_row(snapshot, rows, ask, mix, policies)
    return _best_rows(snapshot, np.unique(rows), ask, mix, policies, count=count)


def _best_rows(snapshot: Snapshot, rows: Rows, ask: Ask, mix: Mix, policies: Policies, *, count: int) -> Rows:
    """Return the best of these rows in order; a tier is computed only for those that may still be among them."""
    keys: list[FloatArray] = []
    edge, left = np.ones(len(rows), np.bool_), count  # level so far, and how many of them there is room for
    for tier in policies.tiers:
        scores = scores_of(snapshot, rows, ask, mix, [name for name, _ in tier])
        total = combine.tier_sum([(weight, scores[name]) for name, weight in tier])
        keys.append(total)
        level = total[edge]
        if len(level) <= left:
            continue
        last = np.partition(level, len(level) - left)[len(level) - left]
        left -= int(np.count_nonzero(level > last))
        kept = ~edge | (total >= last)
        edge = (edge & (total == last))[kept]
        rows, keys = rows[kept], [key[kept] for key in keys]
    return rows[combine.best(keys, snapshot.rank[rows], np.arange(len(rows)), count)]


def best_row(snapshot: Snapshot, rows: Rows, ask: Ask, mix: Mix, policies: Policies) -> Rows:
    """Return the best of these rows, or none of none; each tier is computed for the rows that are still level alone."""
    for tier in policies.tiers:
        if len(rows) < 2:  # noqa: PLR2004 - a row alone is the best one
            break
        scores = scores_of(snapshot, rows, ask, mix, [name for name, _ in tier])
        total = combine.tier_sum([(weight, scores[name]) for name, weight in tier])
        rows = rows[total == total.max()]
    return rows[np.argsort(snapshot.rank[rows])][:1]


def scores_of(snapshot: Snapshot, rows: Rows, ask: Ask, mix: Mix, names: Iterable[str]) -> dict[str, FloatArray]:
    """Return these scores of these rows alone, by name; 0..1 each, meaningful where a row passes."""
    most = 2 * len(rows) > snapshot.nodes  # gathering most rows costs more than judging all of them
    near = snapshot if most else Near(snapshot, rows)
    return {
        name: SCORES[name](snapshot, ask, mix)[rows] if most or name in CLUSTER_WIDE else SCORES[name](near, ask, mix)
        for name in names
    }


def _pass(near: Snapshot, ask: Ask, mix: Mix, policies: Policies, masks: Collection[str]) -> BoolArray:
    passes = np.ones(near.nodes, np.bool_)
    for name in policies.masks:
        if name in masks and ONLY_FOR.get(name, ask.kind) == ask.kind:
            passes &= MASKS[name](near, ask, mix)
    return passes
