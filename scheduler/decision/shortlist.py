"""The best of a few named nodes, judged without a look at the others: what /filter asks on every call.

Invariant: it names the same nodes in the same order as `judge(...).best(rows, count)`. Masks and most scores look at
one node at a time, so the columns they touch are gathered for the named nodes alone, and only those they touch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from policies.columns import COLUMN_DTYPES, Ask, BoolArray, FloatArray, Mix, Snapshot

from . import combine
from .catalog import MASKS, SCORES, Policies
from .combine import Rows

CLUSTER_WIDE = frozenset({"keep-scarce", "fill-host"})
"""Scores that measure a node against the whole cluster; the others look at one node alone."""


class Near(Snapshot):
    """Some rows of a snapshot; a column is gathered when it is first read, so use it up before the columns change."""

    __slots__ = ("_rows", "_whole")

    def __init__(self, whole: Snapshot, rows: Rows) -> None:
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
    if len(rows) > 1 and count > 1:
        rows = np.unique(rows)
    places = np.arange(len(rows))
    return rows[combine.best(_tiers(snapshot, rows, ask, mix, policies), snapshot.rank[rows], places, count)]


def _pass(near: Snapshot, ask: Ask, mix: Mix, policies: Policies, masks: Collection[str]) -> BoolArray:
    passes = np.ones(near.nodes, np.bool_)
    for name in policies.masks:
        if name in masks:
            passes &= MASKS[name](near, ask, mix)
    return passes


def _tiers(snapshot: Snapshot, rows: Rows, ask: Ask, mix: Mix, policies: Policies) -> Iterator[FloatArray]:
    """Yield the tier sums of these rows, each computed only when it is asked for."""
    near = Near(snapshot, rows)
    for tier in policies.tiers:
        yield combine.tier_sum(
            [
                (
                    weight,
                    SCORES[name](snapshot, ask, mix)[rows] if name in CLUSTER_WIDE else SCORES[name](near, ask, mix),
                )
                for name, weight in tier
            ]
        )
