"""The expected fragment of the free GPU, against a plain loop and on drawn clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from policies.columns import Ask, Health, Kind, Mix, Mode, Snapshot, empty_mix
from policies.fragmentation import expected_fragment
from tests.drawing import cluster
from tests.policies.oracle import fragment
from tests.policies.strategies import worlds


def mix_of(*counts: int) -> Mix:
    """Return equally frequent classes that ask so many whole GPUs."""
    size = len(counts)
    return Mix(
        kind=np.full(size, Kind.WHOLE, np.uint8),
        count=np.asarray(counts, np.int32),
        cpu_milli=np.zeros(size, np.int64),
        device_milli=np.full(size, 1000, np.int32),
        device_mib=np.zeros(size, np.int32),
        profile=np.full(size, -1, np.int32),
        models=np.ones((size, 8), np.bool_),
        weight=np.full(size, 1 / size, np.float32),
        price=np.zeros(8, np.float32),
    )


@pytest.mark.parametrize(
    ("nodes", "counts", "lost"),
    [
        pytest.param(["....", "xxx.", "xxxx"], (1,), [0, 0, 0], id="one GPU fits wherever one is free"),
        pytest.param(["....", "xxx.", "xx.."], (2,), [0, 1000, 0], id="a last one is of no use for two"),
        pytest.param(["....", "xxx.", "xx.."], (1, 4), [0, 500, 1000], id="by how often each comes"),
        pytest.param(["observed xxx.", "observed x..."], (2,), [1000, 0], id="observed nodes by their tokens"),
    ],
)
def test_what_is_of_no_use(nodes: list[str], counts: tuple[int, ...], lost: list[int]) -> None:
    useless, idle = expected_fragment(cluster(*nodes), mix_of(*counts))
    assert useless.tolist() == lost
    assert idle.tolist() == [1000 * node.count(".") for node in nodes]


@given(worlds())
def test_as_a_plain_loop_counts(world: tuple[Snapshot, Ask, Mix]) -> None:
    s, _, mix = world
    useless, idle = expected_fragment(s, mix)
    seen = bool({Kind.WHOLE, Kind.SHARE} & set(mix.kind.tolist()))
    for n in range(s.nodes):
        open_to = [d for d in range(s.slots) if s.exists[d, n] and not s.mig_mode[d, n]]
        open_to = [d for d in open_to if s.health[d, n] == Health.HEALTHY and s.milli_free[d, n] > 0]
        if s.mode[n] != Mode.EXACT:
            open_to = open_to[: max(int(s.gpus_free[n]), 0)]
        free = [int(s.milli_free[d, n]) if d in open_to else 0 for d in range(s.slots)]
        assert idle[n] == sum(free)
        expected = fragment(s, mix, n, free, int(s.cpu_milli_free[n])) if seen else 0.0
        assert useless[n] == pytest.approx(expected, abs=0.01)


def test_nothing_is_of_no_use_while_nothing_was_asked() -> None:
    useless, idle = expected_fragment(cluster("....", "xx.."), empty_mix(8))
    assert (useless.tolist(), idle.tolist()) == ([0, 0], [4000, 2000])
