"""Scores on drawn clusters: which node comes first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies import packing
from policies.columns import FloatArray, empty_mix
from tests.drawing import ask, cluster

MIX = empty_mix(4)


def order(scores: FloatArray) -> list[list[int]]:
    """Rows from best to worst, equals side by side."""
    return [np.flatnonzero(scores == value).tolist() for value in sorted(set(scores.tolist()), reverse=True)]


@pytest.mark.parametrize(
    ("nodes", "count", "best_first"),
    [
        pytest.param(["....", "xxx.", "xx.."], 1, [[1], [2], [0]], id="close the smallest gap"),
        pytest.param(["....", "observed xx..", "observed .xxx"], 2, [[1], [0], [2]], id="exact and observed alike"),
        pytest.param(["....", "xx..", "-", "xxxx"], 0, [[2], [3], [1], [0]], id="CPU-only: spare the GPU nodes"),
    ],
)
def test_fill_gpus(nodes: list[str], count: int, best_first: list[list[int]]) -> None:
    assert order(packing.fill_gpus(cluster(*nodes), ask(count, nodes=len(nodes)), MIX)) == best_first


def test_fill_gpus_gives_nothing_to_a_node_with_too_few() -> None:
    assert packing.fill_gpus(cluster(".x", ".."), ask(2, nodes=2), MIX).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("nodes", "best_first"),
    [
        pytest.param(["cpu=90 -", "cpu=20 -", "-"], [[1], [0], [2]], id="least cpu left"),
    ],
)
def test_fill_host_and_its_opposite(nodes: list[str], best_first: list[list[int]]) -> None:
    snapshot, wanted = cluster(*nodes), ask(nodes=len(nodes))
    assert order(packing.fill_host(snapshot, wanted, MIX)) == best_first
    assert order(packing.spread(snapshot, wanted, MIX)) == best_first[::-1]


def test_fill_host_weighs_128_cores_like_a_tebibyte() -> None:
    cores, gibibytes = np.asarray([128_000, 0, 64_000, 63_000]), np.asarray([0, 1024, 512, 512])
    snapshot = replace(cluster("-", "-", "-", "-"), cpu_milli_free=cores, memory_bytes_free=gibibytes << 30)
    found = packing.fill_host(snapshot, replace(ask(nodes=4), cpu_milli=0, memory_bytes=0), MIX)
    assert order(found) == [[3], [0, 1, 2]]
    assert found[0] == 0.5


def test_spread_goes_by_gpus_for_a_device_ask() -> None:
    snapshot = cluster("x...", "xx......", "xxxx", "........")
    assert order(packing.spread(snapshot, ask(1, nodes=4), MIX)) == [[3], [1], [0], [2]]


@pytest.mark.parametrize(
    ("models", "count", "best_first"),
    [
        pytest.param((), 1, [[0, 2], [1], [3]], id="no wish: the commonest model"),
        pytest.param(("A100", "T4"), 1, [[0, 2], [1], [3]], id="a wish with a choice"),
        pytest.param(("H100",), 1, [[0, 1, 2, 3]], id="no choice, no preference"),
        pytest.param((), 0, [[0, 1, 2, 3]], id="no devices, no preference"),
    ],
)
def test_keep_scarce(models: tuple[str, ...], count: int, best_first: list[list[int]]) -> None:
    snapshot = cluster("T4 ....", "A100 ..", "T4 ....", "H100 .")
    assert order(packing.keep_scarce(snapshot, ask(count, nodes=4, models=models), MIX)) == best_first
