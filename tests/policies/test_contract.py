"""What every registered policy keeps, whatever it decides."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Ask, Mix, Snapshot
from scheduler.decision.catalog import MASKS, REASONS, SCORES
from tests.policies import oracle
from tests.policies.strategies import permuted, worlds

POLICIES = {**MASKS, **SCORES}
EXAMPLES = settings(max_examples=30, deadline=None)


def test_every_policy_has_an_oracle_and_every_mask_a_word() -> None:
    assert list(oracle.MASKS) == list(MASKS) == list(REASONS)
    assert list(oracle.SCORES) == list(SCORES)


@pytest.mark.parametrize("name", POLICIES)
@EXAMPLES
@given(world=worlds())
def test_shape_type_and_range(name: str, world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot = world[0]
    answer = POLICIES[name](*world)
    assert answer.shape == (snapshot.nodes,)
    assert answer.dtype == (np.bool_ if name in MASKS else np.float32)
    assert ((answer >= 0) & (answer <= 1)).all()


@pytest.mark.parametrize("name", POLICIES)
@EXAMPLES
@given(world=worlds(), data=st.data())
def test_the_order_of_rows_means_nothing(name: str, world: tuple[Snapshot, Ask, Mix], data: st.DataObject) -> None:
    snapshot, ask, mix = world
    order = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)
    there = POLICIES[name](*permuted(snapshot, ask, order), mix)
    assert there.tolist() == POLICIES[name](snapshot, ask, mix)[order].tolist()


@pytest.mark.parametrize("name", POLICIES)
@EXAMPLES
@given(world=worlds())
def test_inputs_stay_as_they_are(name: str, world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, ask, _ = world
    before, allowed, models, extended = snapshot.copy(), ask.allowed.copy(), ask.models.copy(), ask.extended.copy()
    POLICIES[name](*world)
    for field in fields(Snapshot):
        assert np.array_equal(getattr(snapshot, field.name), getattr(before, field.name)), field.name
    assert np.array_equal(ask.allowed, allowed)
    assert np.array_equal(ask.models, models)
    assert np.array_equal(ask.extended, extended)


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_a_mask_says_what_a_loop_over_nodes_and_devices_says(name: str, world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, ask, _ = world
    expected = [bool(oracle.MASKS[name](snapshot, ask, row)) for row in range(snapshot.nodes)]
    assert MASKS[name](*world).tolist() == expected


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_a_score_says_what_a_loop_over_nodes_says(name: str, world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, ask, mix = world
    expected = [oracle.score(name, snapshot, ask, row, mix) for row in range(snapshot.nodes)]
    assert SCORES[name](*world).tolist() == pytest.approx(expected, abs=1e-6)
