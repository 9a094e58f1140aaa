"""What a placement is likely to waste: a gap, a node short of CPU, a broken node, a dear model, each by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies import waste
from policies.columns import Kind, Mix, empty_mix
from policies.waste import card_costs, gaps, least_waste, open_milli, outlook
from tests.drawing import ask, cluster

MODELS = 4


def mix_of(*classes: tuple[Kind, int, int, int]) -> Mix:
    """Return equally frequent classes: kind, devices, milli of each, cores."""
    size = len(classes)
    kinds, counts, milli, cores = zip(*classes, strict=True)
    return Mix(
        kind=np.asarray(kinds, np.uint8),
        count=np.asarray(counts, np.int32),
        cpu_milli=1000 * np.asarray(cores, np.int64),
        device_milli=np.asarray(milli, np.int32),
        device_mib=np.zeros(size, np.int32),
        profile=np.full(size, -1, np.int32),
        models=np.ones((size, MODELS), np.bool_),
        weight=np.full(size, 1 / size, np.float32),
        price=np.zeros(MODELS, np.float32),
    )


def test_a_gap_that_no_share_fits_is_wasted_and_one_that_is_filled_is_not() -> None:
    table = gaps(mix_of((Kind.SHARE, 1, 500, 1)), 0)
    assert table[[0, 200, 490]].tolist() == [0, 200_000, 490_000]
    assert table[[500, 600, 1000]].tolist() == [0, 100_000, 0]


def test_a_seldom_share_fills_a_gap_with_less_chance() -> None:
    often = gaps(mix_of((Kind.SHARE, 1, 200, 1), (Kind.SHARE, 1, 900, 1)), 0)
    seldom = replace(mix_of((Kind.SHARE, 1, 200, 1), (Kind.SHARE, 1, 900, 1)), weight=np.asarray([0.01, 0.99], "f4"))
    assert often[200] < 10
    assert gaps(seldom, 0)[200] == pytest.approx(200_000 * 0.99**30, rel=0.01)


def test_while_nobody_shares_every_gap_is_wasted() -> None:
    assert gaps(mix_of((Kind.WHOLE, 1, 1000, 1)), 0).tolist()[::100] == [100_000 * n for n in range(11)]
    assert gaps(empty_mix(MODELS), 0)[370] == 370_000


def test_a_share_by_memory_is_what_it_is_of_the_card() -> None:
    mix = replace(mix_of((Kind.SHARE, 1, 0, 1)), device_mib=np.asarray([6000], np.int32))
    assert gaps(mix, 12_000)[[490, 500]].tolist() == [490_000, 0]
    assert gaps(mix, 24_000)[[240, 250]].tolist() == [240_000, 0]
    assert gaps(mix, 5_000)[1000] == 1_000_000, "it fits no such card"


def test_a_share_goes_where_it_leaves_the_gap_that_others_fill() -> None:
    snapshot = cluster("sss", "...")
    live = snapshot.milli_free.copy()
    live[:, 0] = (600, 900, 1000)
    snapshot = replace(snapshot, milli_free=live)
    mix = mix_of((Kind.SHARE, 1, 500, 1), (Kind.SHARE, 1, 400, 1))
    wanted = ask(1, nodes=2, kind=Kind.SHARE, device_milli=400)
    costs = card_costs(snapshot, wanted, mix, open_milli(snapshot))
    assert costs[:, 0].argmin() == 1, "900 = 400 + 500, while 600 - 400 leaves 200 that nobody fills"
    assert costs[0, 0] > 0
    wanted = replace(wanted, device_milli=950)
    assert card_costs(snapshot, wanted, mix, open_milli(snapshot))[:2, 0].tolist() == [waste.NO_ROOM] * 2


def test_who_brings_much_cpu_goes_where_it_strands_no_gpu() -> None:
    mix = mix_of((Kind.WHOLE, 1, 1000, 10))
    assert outlook(mix).cores == pytest.approx(10)
    snapshot = cluster("cpu=40 ....", "cpu=100 ....")
    snapshot = replace(snapshot, cpu_milli_free=1000 * snapshot.cpu_milli_free)
    heavy = ask(1, nodes=2, cpu_milli=25_000)
    low, high = least_waste(snapshot, heavy, mix)
    assert high > low
    light = ask(1, nodes=2, cpu_milli=5_000)
    low, high = least_waste(snapshot, light, mix)
    assert low > high, "the fuller host otherwise"
    beside = ask(0, nodes=2, cpu_milli=8_000)
    low, high = least_waste(snapshot, beside, mix)
    assert high > low, "a CPU-only pod takes what the GPUs can spare"


def test_a_node_that_is_whole_stays_whole_while_such_are_asked() -> None:
    several, one = mix_of((Kind.WHOLE, 8, 1000, 8), (Kind.WHOLE, 1, 1000, 1)), mix_of((Kind.WHOLE, 1, 1000, 1))
    snapshot = cluster("........", "x......x")
    whole, broken = least_waste(snapshot, ask(1, nodes=2), several)
    assert broken > whole
    assert broken - whole > 2 * np.subtract(*least_waste(snapshot, ask(1, nodes=2), one)[::-1])


def test_who_may_choose_leaves_dear_models_alone() -> None:
    mix = mix_of((Kind.WHOLE, 1, 1000, 1))
    dear = np.zeros(MODELS, np.float32)
    snapshot = cluster("A100 x..", "x..")
    dear[int(snapshot.model[0, 0])] = 0.9
    wanted = ask(1, nodes=2)
    rare, common = least_waste(snapshot, wanted, mix)
    assert rare == common
    rare, common = least_waste(snapshot, wanted, replace(mix, price=dear))
    assert common > rare


def test_a_pod_without_gpus_spares_gpu_nodes_however_full() -> None:
    gpu, without = least_waste(cluster("xxxx", "-"), ask(0, nodes=2), mix_of((Kind.WHOLE, 1, 1000, 1)))
    assert without > gpu


@pytest.mark.parametrize("slices", [0, 7])
@pytest.mark.parametrize("devices", [0, 4])
def test_a_pod_without_gpus_spares_nodes_that_only_offer_mig_slices(slices: int, devices: int) -> None:
    drawn = cluster("----", "-")
    exists = drawn.exists.copy()
    exists[:, 0], exists[:devices, 0] = False, True
    none = np.zeros_like(drawn.gpus_total)
    total, free = np.array([[slices, 0]]), np.array([[0, 0]])
    snapshot = replace(drawn, exists=exists, gpus_total=none, gpus_free=none, slices_total=total, slices_free=free)
    sliced, without = least_waste(snapshot, ask(0, nodes=2), empty_mix(MODELS))
    assert (without - sliced > 0.05) == bool(slices or devices)
