"""Masks on drawn clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from policies import fit
from policies.columns import Ask, Kind, Mix, Snapshot, empty_mix
from tests.drawing import ask, cluster
from tests.policies.strategies import worlds

MIX = empty_mix(4)


@pytest.mark.parametrize(
    ("nodes", "count", "models", "fits"),
    [
        pytest.param([".", "x", "-"], 1, (), [1, 0, 0], id="one free, one taken, none there"),
        pytest.param(["..", ".x", "xx"], 2, (), [1, 0, 0], id="two at once"),
        pytest.param([".!", "!.", "!!"], 1, (), [1, 1, 0], id="a broken device is never free"),
        pytest.param([".m", "mm", "MM"], 1, (), [1, 0, 0], id="a device in MIG mode is never whole"),
        pytest.param([".s", "ss"], 1, (), [1, 0], id="a shared device is taken"),
        pytest.param(["?..", "???"], 2, (), [1, 0], id="gaps and padding count for nothing"),
        pytest.param(["T4 ..", "A100 .."], 1, ("T4",), [1, 0], id="only the wanted model"),
        pytest.param(["T4 ..", "A100 ..", ".."], 1, ("T4", "A100"), [1, 1, 0], id="either of two models"),
        pytest.param(["observed ..", "observed .x", "observed x!"], 2, (), [1, 0, 0], id="observed: tokens only"),
        pytest.param(["observed .!"], 2, (), [1], id="observed: whose device is broken is not ours to say"),
        pytest.param(["xx", "-"], 0, (), [1, 1], id="a CPU-only pod fits anywhere"),
    ],
)
def test_devices_free(nodes: list[str], count: int, models: tuple[str, ...], fits: list[int]) -> None:
    snapshot = cluster(*nodes)
    answer = fit.devices_free(snapshot, ask(count, nodes=len(nodes), models=models), MIX)
    assert answer.astype(int).tolist() == fits


@pytest.mark.parametrize(
    ("nodes", "count", "sized", "sound"),
    [
        pytest.param(["xx", "xxxx"], 4, [0, 1], [0, 1], id="taken or not"),
        pytest.param(["x!!!", "x..!"], 3, [1, 1], [0, 1], id="broken ones count for size, not for health"),
        pytest.param(["..mm"], 3, [0], [0], id="MIG mode counts for neither"),
        pytest.param(["observed ...!", "observed !!!!"], 4, [1, 1], [1, 0], id="observed: one sound device will do"),
    ],
)
def test_size_and_health(nodes: list[str], count: int, sized: list[int], sound: list[int]) -> None:
    snapshot, wanted = cluster(*nodes), ask(count, nodes=len(nodes))
    assert fit.gpu_count(snapshot, wanted, MIX).astype(int).tolist() == sized
    assert fit.healthy(snapshot, wanted, MIX).astype(int).tolist() == sound


@pytest.mark.parametrize(
    ("nodes", "more", "masks"),
    [
        pytest.param(["observed replicas .", "replicas .", "."], {}, {"whole_gpu_kind": [0, 1, 1]}, id="replicas"),
        pytest.param([".", "foreign ."], {}, {"named_devices": [1, 0]}, id="a stranger's unnamed device"),
        pytest.param([".", "observed ."], {"init_only": True}, {"init_only": [0, 1]}, id="only an init container asks"),
        pytest.param([".", "hole ."], {}, {"in_service": [1, 0]}, id="a hole"),
        pytest.param(
            [".", "observed ."],
            {"kind": Kind.SHARE},
            {"whole_gpu_kind": [1, 0], "gpu_count": [1, 1], "devices_free": [1, 1]},
            id="shares on exact nodes alone",
        ),
        pytest.param(
            ["shares=1 .", "shares=0 ."], {"kind": Kind.SHARE}, {"devices_free": [1, 0]}, id="a share needs its token"
        ),
        pytest.param(
            [".", "m", "observed .", "observed 2g.20gb=1 ."],
            {"profile": "2g.20gb"},
            {"whole_gpu_kind": [1, 1, 1, 1], "gpu_count": [0, 1, 0, 1], "healthy": [0, 1, 1, 1]},
            id="MIG instances by the devices in MIG mode, or by what is cut",
        ),
    ],
)
def test_kinds(nodes: list[str], more: dict[str, Any], masks: dict[str, list[int]]) -> None:
    snapshot, wanted = cluster(*nodes), ask(1, nodes=len(nodes), **more)
    assert {name: getattr(fit, name)(snapshot, wanted, MIX).astype(int).tolist() for name in masks} == masks


@pytest.mark.parametrize(
    ("more", "size", "room"),
    [
        pytest.param({"cpu_milli": 50}, [1, 1, 1], [1, 0, 1], id="cpu"),
        pytest.param({"cpu_milli": 0, "memory_bytes": 50}, [1, 1, 1], [1, 1, 0], id="memory"),
        pytest.param({"cpu_milli": 101}, [0, 0, 0], [0, 0, 0], id="more than any node has"),
        pytest.param({"cpu_milli": 0, "memory_bytes": 0}, [1, 1, 1], [1, 1, 1], id="nothing asked fits anywhere"),
        pytest.param({"storage_bytes": 101}, [0, 0, 0], [0, 0, 0], id="storage"),
    ],
)
def test_host(more: dict[str, Any], size: list[int], room: list[int]) -> None:
    snapshot = cluster("-", "cpu=-10 -", "memory=49 -")
    wanted = ask(nodes=3, **more)
    assert fit.host_size(snapshot, wanted, MIX).astype(int).tolist() == size
    assert fit.cpu_memory(snapshot, wanted, MIX).astype(int).tolist() == room


def test_a_full_node_takes_no_pod() -> None:
    assert fit.cpu_memory(cluster("pods=0 -", "pods=1 -"), ask(nodes=2), MIX).tolist() == [False, True]


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_free_slots_are_the_free_devices_of_one_node(world: tuple[Snapshot, Ask, Mix]) -> None:
    snapshot, wanted, _ = world
    free = fit.free_devices(snapshot, wanted)
    for row in range(snapshot.nodes):
        assert fit.free_slots(snapshot, row, wanted) == np.flatnonzero(free[:, row]).tolist()
