"""Judging an ask: against a loop over the oracles, and on drawn clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Ask, Kind, Mix, Snapshot, empty_mix
from scheduler.decision.catalog import (
    DEFAULT_MASKS,
    DEFAULT_TIERS,
    FILTER_MASKS,
    REASONS,
    SCORES,
    TURN_MASKS,
    read_policies,
)
from scheduler.decision.explain import funnel
from scheduler.decision.pipeline import Policies, Verdict, judge
from scheduler.decision.placing import judge_row
from tests.drawing import ask, cluster
from tests.policies import oracle
from tests.policies.strategies import permuted, worlds

MIX = empty_mix(4)
SPREAD = read_policies(tiers=[["spread", "keep-scarce"], {"fill-host": 2.0}])


@settings(max_examples=150, deadline=None)
@given(world=worlds(), masks=st.sampled_from([FILTER_MASKS, TURN_MASKS]), data=st.data())
def test_a_verdict_says_what_a_loop_says(
    world: tuple[Snapshot, Ask, Mix], masks: tuple[str, ...], data: st.DataObject
) -> None:
    snapshot, wanted, mix = world
    policies = data.draw(st.sampled_from([Policies(), SPREAD]))
    verdict = judge(snapshot, wanted, mix, policies, masks)
    failing = [
        next((i for i, name in enumerate(masks) if not oracle.MASKS[name](snapshot, wanted, row)), -1)
        for row in range(snapshot.nodes)
    ]
    assert verdict.failed.masks == masks
    assert verdict.failed.first.dtype == np.int8
    assert verdict.failed.first.tolist() == failing
    assert verdict.passes.tolist() == [index < 0 for index in failing]
    left = [sum(index < 0 or index > place for index in failing) for place in range(len(masks))]
    assert funnel(verdict.failed) == list(zip(masks, left, strict=True))
    rows = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)[: data.draw(st.integers(0, 12))]
    assert verdict.failed.reasons(rows) == [REASONS[masks[failing[row]]] if failing[row] >= 0 else "" for row in rows]
    passing = [row for row in rows.tolist() if failing[row] < 0]
    assert sorted(verdict.best(rows, 99).tolist()) == sorted(passing)
    assert verdict.best(rows).tolist() == verdict.best(rows, 99).tolist()[:1]
    for row in rows.tolist():
        word = judge_row(snapshot, row, wanted, mix, policies, masks=masks)
        assert [word] == verdict.failed.reasons(np.asarray([row], np.intp))


@settings(max_examples=100, deadline=None)
@given(world=worlds(), data=st.data())
def test_the_chosen_node_does_not_depend_on_the_order_of_rows(
    world: tuple[Snapshot, Ask, Mix], data: st.DataObject
) -> None:
    snapshot, wanted, mix = world
    order = np.asarray(data.draw(st.permutations(range(snapshot.nodes))), np.intp)
    moved = judge(*permuted(snapshot, wanted, order), mix, Policies(), FILTER_MASKS)
    here = judge(snapshot, wanted, mix, Policies(), FILTER_MASKS)
    for count in (1, 3):
        assert order[moved.best(count=count)].tolist() == here.best(count=count).tolist()


@pytest.mark.parametrize(
    ("nodes", "count", "models", "word"),
    [
        pytest.param(["xx", "xx", "-"], 1, (), "GpusBusy", id="busy is closer than none there"),
        pytest.param(["xx", "!!"], 1, (), "GpusBusy", id="busy is closer than broken"),
        pytest.param(["!!", "T4 .."], 1, ("H100",), "GpuUnhealthy", id="broken is closer than another model"),
        pytest.param(["T4 ..", "-"], 1, ("A100",), "GpuModelMismatch", id="nobody has the model"),
        pytest.param(["....", "T4 ....", "-"], 8, (), "ExceedsNodeSize", id="no node is that large"),
        pytest.param(["foreign ..", "T4 .."], 1, ("H100",), "InventoryStale", id="an unnamed device"),
        pytest.param(["observed replicas .."], 1, (), "SharingNotAllowed", id="no whole GPU there"),
        pytest.param(["xx", ".."], 1, (), "", id="one fits"),
        pytest.param([], 1, (), "InventoryStale", id="no node at all"),
    ],
)
def test_headline(nodes: list[str], count: int, models: tuple[str, ...], word: str) -> None:
    wanted = ask(count, nodes=len(nodes), models=models)
    assert judge(cluster(*nodes), wanted, MIX, Policies(), FILTER_MASKS).failed.headline() == word


def test_headline_of_some_rows() -> None:
    verdict = judge(cluster("xx", "T4 xx", "-", ".."), ask(1, nodes=4, models=("H100",)), MIX, Policies(), FILTER_MASKS)
    assert verdict.failed.headline(np.asarray([1, 2], np.intp)) == "GpuModelMismatch"
    assert verdict.failed.headline(np.asarray([1, 2, 0], np.intp)) == "GpusBusy"
    assert verdict.failed.headline(np.asarray([], np.intp)) == "InventoryStale"


@pytest.mark.parametrize(
    ("nodes", "more", "words"),
    [
        pytest.param(
            ["T4 mm", "..", "mM", "MM", "observed ..", "observed 2g.20gb=0/2 .", "A30 m", "observed 2g.20gb=1 ."],
            {"profile": "2g.20gb"},
            "NoSuchMigProfile,MigModeOff,,MigProfileUnplaceable,NoSuchMigProfile,MigProfileUnplaceable,"
            "NoSuchMigProfile,",
            id="MIG",
        ),
        pytest.param(
            ["mmx.", "mm!"], {"profile": "7g.80gb", "count": 3}, "ExceedsNodeSize,ExceedsNodeSize", id="too many"
        ),
        pytest.param(["A100 m"], {"profile": "2g.20gb"}, "NoSuchMigProfile", id="another model's name"),
        pytest.param(["A100 m"], {"profile": "1g.10gb", "models": ("H100",)}, "GpuModelMismatch", id="another model"),
        pytest.param(
            ["..", "xx", "s.", "sx", "mm", "!!", "observed ..", "T4 ."],
            {"kind": Kind.SHARE, "device_milli": 600, "device_mib": 10},
            ",GpuMemoryShort,,GpuCoreShort,ExceedsNodeSize,GpuUnhealthy,SharingNotAllowed,",
            id="shares",
        ),
        pytest.param(
            ["s", "shares=0 ."],
            {"kind": Kind.SHARE, "device_milli": 10, "device_mib": 60},
            "GpuMemoryShort,GpusBusy",
            id="memory before time",
        ),
        pytest.param(["."], {"kind": Kind.SHARE, "device_milli": 0, "device_mib": 101}, "ExceedsGpuMemory", id="large"),
    ],
)
def test_reasons_of_mig_and_shares(nodes: list[str], more: dict[str, Any], words: str) -> None:
    wanted = ask(**({"count": 1, "nodes": len(nodes)} | more))
    verdict = judge(cluster(*nodes), wanted, MIX, Policies(), FILTER_MASKS)
    assert verdict.failed.reasons(np.arange(len(nodes))) == words.split(",")


@pytest.mark.parametrize(
    ("nodes", "count", "best"),
    [
        pytest.param(["....", "xxx.", "xx.."], 1, [1, 2, 0], id="fill the fullest"),
        pytest.param(["....", "....", "...."], 1, [0, 1, 2], id="then by name"),
        pytest.param(["cpu=90 ....", "cpu=20 ....", "...."], 1, [1, 0, 2], id="then the fuller host"),
        pytest.param(["A100 .x", "....", "...x"], 1, [0, 2, 1], id="no model is dear that nobody asks for"),
        pytest.param(["....", "-", "xxxx"], 0, [1, 2, 0], id="CPU-only pods spare GPUs"),
        pytest.param(["xxxx", "!!..", "x..."], 3, [2], id="only what passes"),
    ],
)
def test_best_by_default(nodes: list[str], count: int, best: list[int]) -> None:
    verdict = judge(cluster(*nodes), ask(count, nodes=len(nodes)), MIX, Policies())
    assert verdict.best(count=9).tolist() == best
    assert verdict.best().tolist() == best[:1]


def test_a_spread_profile_takes_the_emptiest() -> None:
    verdict = judge(cluster("xx..", "....", "xxx."), ask(1, nodes=3), MIX, read_policies(tiers=[["spread"]]))
    assert verdict.best(count=3).tolist() == [1, 0, 2]


def test_filter_leaves_cpu_memory_and_place_to_kube_scheduler() -> None:
    snapshot = cluster("cpu=-5 pods=0 .")
    wanted = ask(1, nodes=1, cpu_milli=7, allowed=np.zeros(1, np.bool_))
    assert judge(snapshot, wanted, MIX, Policies(), FILTER_MASKS).passes.tolist() == [True]
    assert judge(snapshot, wanted, MIX, Policies()).failed.headline() == "NoMatchingNode"


@pytest.mark.parametrize(
    ("masks", "tiers", "says"),
    [
        (["in-service", "devices"], None, "there is no mask 'devices'; legal names: in-service, allowed"),
        (DEFAULT_MASKS[:-1], None, "'cpu-memory' is missing"),
        ([*DEFAULT_MASKS, "model"], None, "a mask is named twice"),
        (None, [["fill-gpus"], ["fill"]], "there is no score 'fill'; legal names: fill-gpus, fill-host"),
        (None, [["spread"], {"spread": 2.0}], "a score is named twice"),
        (None, [["spread"], []], "a tier is empty"),
        (None, [{"spread": 0.0}], "a number above 0"),
        (None, [{"spread": float("nan")}], "a number above 0"),
        (None, [{"spread": float("inf")}], "a number above 0"),
    ],
)
def test_policies_say_what_is_wrong(masks: list[str] | None, tiers: list[list[str]] | None, says: str) -> None:
    with pytest.raises(ValueError, match="policy") as caught:
        read_policies(masks, tiers)
    assert says in str(caught.value)


def test_policies_from_configuration() -> None:
    assert read_policies() == Policies(DEFAULT_MASKS, DEFAULT_TIERS)
    assert SPREAD.tiers == ((("spread", 1.0), ("keep-scarce", 1.0)), (("fill-host", 2.0),))
    assert read_policies(DEFAULT_MASKS[::-1]).masks == DEFAULT_MASKS[::-1]
    assert {name for tier in DEFAULT_TIERS for name, _ in tier} <= set(SCORES)


def test_a_verdict_judges_its_own_snapshot_only_once() -> None:
    verdict: Verdict = judge(cluster("..", "x."), ask(1, nodes=2), MIX, Policies())
    assert verdict.score("fill-gpus") is verdict.score("fill-gpus")
