"""A board, turned to columns that change under it, says at every step what a judgement of the whole cluster says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import COLUMN_DTYPES, Ask, Mix, Snapshot, empty_mix
from scheduler.decision import board as boards
from scheduler.decision.board import Board, Boards
from scheduler.decision.catalog import (
    FILTER_MASKS,
    MASKS,
    SCORES,
    STATIC_MASKS,
    STATIC_SCORES,
    TURN_MASKS,
    asks_of,
    read_policies,
    told_apart_by,
)
from scheduler.decision.near import Near
from scheduler.decision.pipeline import Policies, judge
from tests.drawing import ask, cluster
from tests.policies.strategies import columns, mixes, worlds

EVERY = read_policies(tiers=[list(SCORES)])
SPREAD = read_policies(tiers=[["spread", "keep-scarce"], {"fill-host": 2.0}])
BY_MODEL = read_policies(tiers=[["keep-scarce"], ["fill-gpus"], ["fill-host"]])
BACKWARDS = read_policies(masks=list(reversed(MASKS)), tiers=[["fill-host"], ["keep-scarce"]])
CHOICES = [Policies(), SPREAD, EVERY, BY_MODEL, BACKWARDS]
BOOKED = (
    *("cpu_milli_free", "memory_bytes_free", "storage_bytes_free", "pods_free", "gpus_free", "shares_free", "foreign"),
    *("slices_free", "extended_free", "memory_mib_free", "milli_free", "use", "mig_row", "health"),
)


@pytest.fixture(scope="module", params=[1, 64], ids=["bounded", "outright"], autouse=True)
def bounded_from(request: pytest.FixtureRequest) -> Iterator[None]:
    """With so few nodes one of the two ways would never be gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boards, "BOUNDED_FROM", request.param)
        yield


def check(board: Board, snapshot: Snapshot, wanted: Ask, mix: Mix, data: st.DataObject) -> None:
    """Compare everything a board can be asked with a fresh verdict."""
    verdict = judge(snapshot, wanted, mix, board.policies, board.masks)
    rows = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)[: data.draw(st.integers(0, 12))]
    for count in data.draw(st.permutations([1, 2, 3, 99])):
        assert board.best(rows, count).tolist() == verdict.best(rows, count).tolist()
    if data.draw(st.booleans()):
        assert board.best().tolist() == verdict.best().tolist()
    failed = board.settle(rows)
    assert failed.first[rows].tolist() == verdict.failed.first[rows].tolist()
    sums = [tier.tolist() for tier in verdict.tiers()]
    for row in rows[verdict.passes[rows]].tolist():
        assert board.sums(row) == [tier[row] for tier in sums]
    if data.draw(st.booleans()):
        assert board.settle().first.tolist() == verdict.failed.first.tolist()


@settings(max_examples=150, deadline=None)
@given(world=worlds(), masks=st.sampled_from([FILTER_MASKS, TURN_MASKS]), data=st.data())
def test_it_says_what_a_verdict_says_whatever_changes(
    world: tuple[Snapshot, Ask, Mix], masks: tuple[str, ...], data: st.DataObject
) -> None:
    snapshot, wanted, mix = world
    live: dict[str, Any] = {name: getattr(snapshot, name).copy() for name in COLUMN_DTYPES}
    snapshot = Snapshot(**live)
    board, layout = Board(data.draw(st.sampled_from(CHOICES)), masks), 1
    for generation in range(1, data.draw(st.integers(2, 6))):
        check(board.turn(snapshot, wanted, mix, layout), snapshot, wanted, mix, data)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        fresh = columns(rng, snapshot.nodes, snapshot.slots)
        names: tuple[str, ...] = ()
        some = np.arange(0)
        match data.draw(st.sampled_from(["booked", "booked", "booked", "node", "mix"])):
            case "booked":
                names, some = BOOKED, np.flatnonzero(rng.random(snapshot.nodes) < 0.4)
            case "node":
                names, some = (
                    tuple(fresh),
                    np.flatnonzero(rng.random(snapshot.nodes) < data.draw(st.sampled_from([0.2, 1]))),
                )
                live["rank"][:] = fresh["rank"]
                layout += 1
            case _:
                mix = mixes(rng)
        for name in names:
            if name != "rank":
                live[name][..., some] = fresh[name][..., some]
        live["generation"][some] = generation


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_was_judged_outlives_changes_of_other_nodes(data: st.DataObject) -> None:
    """Most of these nodes pass, so most keys are carried from one layout to the next."""
    drawn = st.sampled_from(["....", "x...", "xx..", "T4 ....", "A100 x...", "observed ..xx", "cpu=50 ....", "s..."])
    nodes = data.draw(st.lists(drawn, min_size=4, max_size=8))
    live: dict[str, Any] = {name: getattr(cluster(*nodes), name).copy() for name in COLUMN_DTYPES}
    snapshot, wanted, mix = Snapshot(**live), ask(1, nodes=len(nodes)), mixes(np.random.default_rng(1))
    mix = replace(mix, models=np.ones((len(mix.weight), len(wanted.models)), np.bool_))
    board, layout = Board(data.draw(st.sampled_from(CHOICES)), FILTER_MASKS), 1
    for generation in range(1, 5):
        check(board.turn(snapshot, wanted, mix, layout), snapshot, wanted, mix, data)
        row = data.draw(st.integers(0, len(nodes) - 1))
        changed = cluster(*(data.draw(drawn) for _ in nodes))
        rank = np.asarray(data.draw(st.permutations(range(len(nodes)))), np.int32)
        for name in COLUMN_DTYPES:
            live[name][..., row] = getattr(changed, name)[..., row]
        live["rank"][:] = rank
        live["generation"][row] = generation
        layout += 1


def test_nodes_that_cannot_win_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    judge_rows = Board._judge

    def noted(board: Board, rows: np.ndarray) -> None:
        judged.extend(rows.tolist())
        judge_rows(board, rows)

    monkeypatch.setattr(Board, "_judge", noted)
    monkeypatch.setattr(boards, "BOUNDED_FROM", 1)
    drawn = cluster("T4 ..", "H100 x.", "H100 ..", "H100 ..", "A100 x.", "observed replicas ..")
    generation, mix = np.zeros(6, np.int64), empty_mix(4)
    board, asked = Board(BY_MODEL, FILTER_MASKS), (replace(drawn, generation=generation), ask(1, nodes=6), mix, 1)
    assert board.turn(*asked).best().tolist() == [1]
    assert judged == [0, 1, 2, 3, 4], "all that Node objects allow"
    judged.clear()
    generation[[0, 4, 5]] = 7
    assert board.turn(*asked).best().tolist() == [1]
    assert not judged, "their models are not as common as that of the best"
    generation[3] = 8
    assert board.turn(*asked).best().tolist() == [1]
    assert not judged, "a look at what would be left is enough"
    generation[1] = 9
    assert board.turn(*asked).best().tolist() == [1]
    assert judged == [1, 3], "nothing is known to be better"
    judged.clear()
    assert board.tidy(asked[0], mix, 1)
    assert judged == [0, 4]
    assert not board.tidy(asked[0], mix, 1)


def test_nothing_is_judged_ahead_by_an_ask_that_may_be_out_of_date() -> None:
    board, mix = Board(Policies(), FILTER_MASKS), empty_mix(4)
    board.turn(cluster("x.", ".."), ask(1, nodes=2), mix, 1)
    assert not board.tidy(cluster("x.", "..", ".."), mix, 2), "a node has come"
    assert not board.tidy(cluster("x.", ".."), empty_mix(4), 1), "the mix has moved"
    assert board.ask_for(mix, 2) is None
    assert board.tidy(cluster("x.", ".."), mix, 1)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), data=st.data())
def test_masks_and_scores_that_are_not_static_look_at_one_node_alone(
    world: tuple[Snapshot, Ask, Mix], data: st.DataObject
) -> None:
    snapshot, wanted, mix = world
    rows = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)[: data.draw(st.integers(0, 12))]
    for name in SCORES.keys() - STATIC_SCORES:
        alone = SCORES[name](Near(snapshot, rows), wanted, mix)
        assert alone.tolist() == SCORES[name](snapshot, wanted, mix)[rows].tolist(), name


@settings(max_examples=100, deadline=None)
@given(world=worlds(), seed=st.integers(0, 2**32 - 1))
def test_static_masks_and_scores_read_nothing_that_bookings_change(world: tuple[Snapshot, Ask, Mix], seed: int) -> None:
    snapshot, wanted, mix = world
    fresh = columns(np.random.default_rng(seed), snapshot.nodes, snapshot.slots)
    booked = {name: getattr(snapshot, name) for name in COLUMN_DTYPES} | {name: fresh[name] for name in BOOKED}
    for name in STATIC_MASKS | STATIC_SCORES:
        policy = MASKS[name] if name in MASKS else SCORES[name]
        assert policy(snapshot, wanted, mix).tolist() == policy(Snapshot(**booked), wanted, mix).tolist(), name


@settings(max_examples=200, deadline=None)
@given(world=worlds())
def test_masks_pass_every_node_for_asks_they_are_not_for(world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, wanted, mix = world
    for name, mask in MASKS.items():
        assert wanted.kind in asks_of(name) or mask(snapshot, wanted, mix).all(), name


@settings(max_examples=200, deadline=None)
@given(world=worlds())
def test_scores_are_the_same_everywhere_for_asks_they_do_not_tell_apart(world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, wanted, mix = world
    for name, score in SCORES.items():
        assert wanted.kind in told_apart_by(name) or len(set(score(snapshot, wanted, mix).tolist())) <= 1, name


def test_a_node_named_twice_is_one_node() -> None:
    board = Board(Policies(), FILTER_MASKS).turn(cluster("....", "xx..", "xxx."), ask(1, nodes=3), empty_mix(4), 1)
    rows = np.asarray([1, 1, 0, 1], np.intp)
    for count, expected in ((1, [1]), (2, [1, 0]), (3, [1, 0])):
        assert board.best(rows, count).tolist() == expected


def test_boards_are_kept_for_the_classes_asked_of_late() -> None:
    kept = Boards(Policies())
    first = kept.of("first", FILTER_MASKS)
    assert kept.of("first", FILTER_MASKS) is first
    assert kept.of("first", TURN_MASKS) is not first
    for number in range(boards.BOARDS_MAX - 2):
        kept.of(number, FILTER_MASKS)
        kept.of("first", FILTER_MASKS)
    kept.of("one more", FILTER_MASKS)
    kept.of("and one", FILTER_MASKS)
    assert kept.of("first", FILTER_MASKS) is first


def test_boards_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "ROWS_MAX", 5)
    kept, snapshot = Boards(Policies()), cluster("..", "..", "..")
    first = kept.of("first", FILTER_MASKS).turn(snapshot, ask(1, nodes=3), empty_mix(4), 1)
    kept.of("second", FILTER_MASKS).turn(snapshot, ask(1, nodes=3), empty_mix(4), 1)
    kept.of("third", FILTER_MASKS)
    assert kept.of("first", FILTER_MASKS) is not first


def test_only_columns_that_are_read_are_gathered() -> None:
    near = Near(cluster("....", "xx..", "xxx."), np.asarray([2, 0], np.intp))
    assert near.gpus_free.tolist() == [1, 4]
    assert (near.nodes, near.slots) == (2, 4)
    assert [name for name in COLUMN_DTYPES if _gathered(near, name)] == ["schedulable", "gpus_free", "exists"]
    with pytest.raises(AttributeError):
        near.colour  # noqa: B018


def _gathered(near: Near, name: str) -> bool:
    try:
        object.__getattribute__(near, name)
    except AttributeError:
        return False
    return True
