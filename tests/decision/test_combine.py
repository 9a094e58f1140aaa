"""From tier sums to one order without ties."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import FloatArray
from scheduler.decision.combine import best, tier_sum


@st.composite
def fields(draw: st.DrawFn) -> tuple[list[FloatArray], np.ndarray, np.ndarray]:
    """Coarse tiers with many ties, distinct ranks, some candidate rows in any order."""
    nodes = draw(st.integers(1, 20))
    coarse = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=nodes, max_size=nodes)
    tiers = [np.asarray(tier, np.float32) for tier in draw(st.lists(coarse, max_size=3))]
    rank = np.asarray(draw(st.permutations(range(nodes))), np.int32)
    rows = draw(st.lists(st.integers(0, nodes - 1), unique=True))
    return tiers, rank, np.asarray(rows, np.intp)


@settings(max_examples=150, deadline=None)
@given(field=fields(), count=st.integers(2, 25))
def test_one_strict_order_for_any_count(field: tuple[list[FloatArray], np.ndarray, np.ndarray], count: int) -> None:
    tiers, rank, rows = field
    expected = sorted(rows.tolist(), key=lambda row: (*(-tier[row] for tier in tiers), rank[row]))
    assert best(iter(tiers), rank, rows, count).tolist() == expected[:count]
    assert best(iter(tiers), rank, rows).tolist() == expected[:1]


@settings(max_examples=100, deadline=None)
@given(field=fields(), data=st.data())
def test_the_same_names_win_in_any_order_of_rows(
    field: tuple[list[FloatArray], np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    tiers, rank, rows = field
    names = np.asarray([f"node-{place:02}" for place in rank])
    order = np.asarray(data.draw(st.permutations(range(len(rank)))), np.intp)
    there = np.argsort(order)[rows]
    shuffled = np.asarray(data.draw(st.permutations(there.tolist())), np.intp)
    moved = best([tier[order] for tier in tiers], rank[order], shuffled, 5)
    assert names[order][moved].tolist() == names[best(tiers, rank, rows, 5)].tolist()


def test_tiers_that_decide_nothing_more_are_not_computed() -> None:
    def tiers() -> Iterator[FloatArray]:
        yield np.asarray([0.5, 1.0], np.float32)
        pytest.fail("the second tier was computed")

    assert best(tiers(), np.asarray([0, 1], np.int32), np.asarray([0, 1], np.intp)).tolist() == [1]


def test_weights_count_inside_a_tier_and_keep_its_range() -> None:
    one, other = np.asarray([1.0, 0.0, 1.0], np.float32), np.asarray([0.0, 1.0, 1.0], np.float32)
    assert tier_sum([(3.0, one), (1.0, other)]).tolist() == pytest.approx([0.75, 0.25, 1.0])
    assert tier_sum([(7.0, one)]).tolist() == [1.0, 0.0, 1.0]
