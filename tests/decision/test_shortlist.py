"""The best of named nodes, found without the others: the same nodes in the same order as a whole verdict has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import COLUMN_DTYPES, Ask, Mix, Snapshot, empty_mix
from scheduler.decision.catalog import FILTER_MASKS, MASKS, ONLY_FOR, SCORES, read_policies
from scheduler.decision.pipeline import Policies, judge
from scheduler.decision.shortlist import CLUSTER_WIDE, Near, best_of
from tests.drawing import ask, cluster
from tests.policies.strategies import worlds

EVERY = read_policies(tiers=[list(SCORES)])
SPREAD = read_policies(tiers=[["spread", "keep-scarce"], {"fill-host": 2.0}])


@settings(max_examples=200, deadline=None)
@given(world=worlds(), data=st.data())
def test_it_is_what_a_verdict_on_the_whole_cluster_says(world: tuple[Snapshot, Ask, Mix], data: st.DataObject) -> None:
    snapshot, wanted, mix = world
    policies = data.draw(st.sampled_from([Policies(), SPREAD, EVERY]))
    rows = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)[: data.draw(st.integers(0, 12))]
    verdict = judge(snapshot, wanted, mix, policies, FILTER_MASKS)
    for count in (1, 2, 3, 5, 99):
        found = best_of(snapshot, rows, wanted, mix, policies, masks=FILTER_MASKS, count=count)
        assert found.tolist() == verdict.best(rows, count).tolist()


@settings(max_examples=100, deadline=None)
@given(world=worlds(), data=st.data())
def test_scores_that_are_not_cluster_wide_look_at_one_node_alone(
    world: tuple[Snapshot, Ask, Mix], data: st.DataObject
) -> None:
    snapshot, wanted, mix = world
    rows = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)[: data.draw(st.integers(0, 12))]
    for name in SCORES.keys() - CLUSTER_WIDE:
        alone = SCORES[name](Near(snapshot, rows), wanted, mix)
        assert alone.tolist() == SCORES[name](snapshot, wanted, mix)[rows].tolist(), name


def test_a_node_named_twice_is_one_node() -> None:
    snapshot = cluster("....", "xx..", "xxx.")
    rows = np.asarray([1, 1, 0, 1], np.intp)
    wanted, mix = ask(1, nodes=3), empty_mix(4)
    for count, expected in ((1, [1]), (2, [1, 0]), (3, [1, 0])):
        found = best_of(snapshot, rows, wanted, mix, Policies(), masks=FILTER_MASKS, count=count)
        assert found.tolist() == expected


def test_only_columns_that_are_read_are_gathered() -> None:
    near = Near(cluster("....", "xx..", "xxx."), np.asarray([2, 0], np.intp))
    assert near.gpus_free.tolist() == [1, 4]
    assert (near.nodes, near.slots) == (2, 4)
    assert [name for name in COLUMN_DTYPES if name in dir(near) and _gathered(near, name)] == [
        "schedulable",
        "gpus_free",
        "exists",
    ]
    with pytest.raises(AttributeError):
        near.colour  # noqa: B018


def _gathered(near: Near, name: str) -> bool:
    try:
        object.__getattribute__(near, name)
    except AttributeError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(world=worlds())
def test_masks_that_are_for_one_kind_pass_every_node_for_the_others(world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, wanted, mix = world
    for name, kind in ONLY_FOR.items():
        assert wanted.kind == kind or MASKS[name](snapshot, wanted, mix).all(), name
