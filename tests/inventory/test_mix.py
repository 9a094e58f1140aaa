"""The mix of requests: weights that decay, sum to one and stay few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import Kind
from scheduler import geometry
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks
from scheduler.inventory.mix import CLASSES_MAX, LEARN_EVERY, Arrivals
from scheduler.inventory.registry import Registry
from tests.objects import raw_node, raw_pod

DAY_US = 86_400_000_000


def arrivals() -> Arrivals:
    return Arrivals(Asks(Registry()))


def learn(made: Arrivals, gpus: int, times: int = 1, at_us: int = 0, cpu: str = "4") -> None:
    for number in range(times):
        made.learn(read_pod(raw_pod(f"p{number}", gpus, cpu)).request, at_us)


def test_nothing_seen_is_an_empty_mix() -> None:
    assert arrivals().mix(0).weight.tolist() == []


def test_weights_are_shares_of_what_came() -> None:
    made = arrivals()
    learn(made, 1, 3)
    learn(made, 8, 1)
    mix = made.mix(0)
    assert dict(zip(mix.count.tolist(), mix.weight.tolist(), strict=True)) == pytest.approx({1: 0.75, 8: 0.25})
    assert mix.kind.tolist() == [Kind.WHOLE, Kind.WHOLE]
    assert mix.device_milli.tolist() == [1000, 1000]


def test_a_class_weighs_half_after_a_half_life() -> None:
    made = arrivals()
    learn(made, 1, 2)
    learn(made, 8, 2, DAY_US)
    mix = made.mix(DAY_US)
    assert mix.weight.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_the_lightest_classes_are_forgotten() -> None:
    made = arrivals()
    learn(made, 8, 5)
    for cpu in range(1, 400):
        learn(made, 1, cpu=str(cpu))
    mix = made.mix(0)
    assert len(mix.weight) == CLASSES_MAX
    assert 8 in mix.count.tolist()


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10 * DAY_US)), min_size=1, max_size=60))
def test_weights_sum_to_one(events: list[tuple[int, int]]) -> None:
    made = arrivals()
    for gpus, at_us in sorted(events, key=lambda event: event[1]):
        learn(made, gpus, at_us=at_us)
    assert made.mix(10 * DAY_US).weight.sum() == pytest.approx(1.0)


def test_the_mix_is_made_anew_now_and_then_only() -> None:
    made = arrivals()
    learn(made, 1)
    first = made.mix(0)
    learn(made, 2, LEARN_EVERY - 1)
    assert made.mix(0) is first
    learn(made, 2)
    assert made.mix(0) is not first


def test_a_mix_that_has_hardly_moved_stays() -> None:
    made = arrivals()
    for _ in range(100):
        learn(made, 1)
        learn(made, 2)
    first = made.mix(0)
    for _ in range(LEARN_EVERY):
        learn(made, 1)
        learn(made, 2)
    assert made.mix(0) is first, "the same parts"
    learn(made, 4)
    learn(made, 1, LEARN_EVERY)
    assert made.mix(0) is not first


def test_mig_instances_are_placed_for_what_is_asked_lately() -> None:
    registry = Registry(geometry.placements())
    made = Arrivals(Asks(registry))
    node = read_node(raw_node("a", **{"tessera.dev/mig-devices": "all"}), geometry.products())
    assert node is not None
    registry.put_node(node)
    raw = raw_pod("p", 0)
    raw["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] = "1"
    raw["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/mig-1g.10gb"] = "1"
    request = read_pod(raw).request
    before = made.asks.ask(request).offer.worth.copy()
    for _ in range(3):
        made.learn(request, 0)
    made.mix(0)
    assert made.asks.ask(request).offer.worth.tolist() != before.tolist()


def wish(made: Arrivals, gpus: int, models: str, times: int = 1) -> None:
    for number in range(times):
        raw = raw_pod(f"w{number}", gpus, "4")
        raw["metadata"]["annotations"] = {"tessera.dev/gpu-model": models}
        made.learn(read_pod(raw).request, 0)


def test_a_model_is_dear_by_how_much_of_it_is_asked() -> None:
    registry = Registry()
    for name, gpus, product in (("a", 6, "Tesla-T4"), ("b", 2, "NVIDIA-L4"), ("c", 2, "NVIDIA-H100-PCIe")):
        registry.put_node(read_node(raw_node(name, gpus=gpus, product=product), geometry.products()))
    made, names = Arrivals(Asks(registry)), registry.columns.models.names
    learn(made, 1, 5)
    assert made.mix(0).price.tolist() == [0.0] * len(names)
    wish(made, 1, "L4,T4", 4)
    wish(made, 1, "H100", LEARN_EVERY)
    price = {name.rpartition("|")[2]: each for name, each in zip(names, made.mix(0).price.tolist(), strict=True)}
    scale = 10 / 41  # as if the 41 GPUs asked were the 10 that there are
    assert price["NVIDIA-H100-PCIe"] == pytest.approx(32 * scale / 2)
    assert price["Tesla-T4"] == pytest.approx(4 * 6 / 8 * scale / 6)
    assert price["NVIDIA-L4"] == pytest.approx(4 * 2 / 8 * scale / 2)


def test_prices_follow_the_nodes_and_a_change_that_matters_little_makes_no_new_mix() -> None:
    registry = Registry()
    for number in range(30):
        registry.put_node(read_node(raw_node(f"n{number}", product="Tesla-T4"), geometry.products()))
    registry.put_node(read_node(raw_node("h", product="NVIDIA-H100-PCIe"), geometry.products()))
    made = Arrivals(Asks(registry))
    wish(made, 1, "H100", 3)
    learn(made, 1, 97)
    first = made.mix(0)
    assert first.price.max() == pytest.approx(3 / 100 * 248 / 8)
    registry.put_node(read_node(raw_node("n30", product="Tesla-T4"), geometry.products()))
    assert made.mix(0) is first
    registry.put_node(read_node(raw_node("h2", product="NVIDIA-H100-PCIe"), geometry.products()))
    assert made.mix(0).price.max() == pytest.approx(3 / 100 * 264 / 16)
