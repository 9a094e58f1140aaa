from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import Kind, Mode
from scheduler.intake.node import read_node
from scheduler.ledger.charges import charge_of, charge_of_allocation
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.node import Device, Node
from scheduler.model.pod import Amounts, DeviceAsk, Request
from tests.objects import PRODUCT, raw_node

MODELS = ("A100", "H100", "H100-80")


def request(devices: DeviceAsk = DeviceAsk(), *, cpu: int = 0, memory: int = 0) -> Request:  # noqa: B008 - frozen
    return Request("id", "team", "a", "job", 0, amounts=Amounts(cpu, memory), devices=devices)


def node(product: str = PRODUCT) -> Node:
    found = read_node(raw_node("n", product=product), {PRODUCT: "H100-80"})
    assert found is not None
    return found


def test_a_pod_counts_in_every_key_that_matches() -> None:
    asked = request(DeviceAsk(Kind.WHOLE, 2), cpu=1500, memory=(1 << 30) + 1)
    without = {"gpu": 2, "cpu": 1500, "memory": 1025}
    assert charge_of(asked, MODELS) == without, "the model is open until the node is known"
    assert charge_of(asked, MODELS, node()) == {**without, "H100": 2, "H100-80": 2}
    assert charge_of(asked, MODELS, node("Tesla-T4")) == without


@pytest.mark.parametrize(
    ("devices", "charge"),
    [
        pytest.param(DeviceAsk(Kind.MIG, 3, profile="1g.10gb+me"), {"mig:1g.10gb+me": 3}, id="instances by name"),
        pytest.param(DeviceAsk(Kind.SHARE, 2, milli=250, memory_mib=100), {"milli": 500}, id="shares of given time"),
        pytest.param(DeviceAsk(Kind.SHARE, 2, memory_mib=20_390), {"milli": 500}, id="shares of memory alone"),
        pytest.param(DeviceAsk(Kind.SHARE, 2, memory_mib=1), {"milli": 2}, id="never nothing"),
        pytest.param(DeviceAsk(), {}, id="no devices"),
    ],
)
def test_what_devices_cost_on_a_node(devices: DeviceAsk, charge: dict[str, int]) -> None:
    assert charge_of(request(devices), MODELS, node()) == charge


def test_a_share_of_memory_alone_costs_little_before_the_node_is_known() -> None:
    assert charge_of(request(DeviceAsk(Kind.SHARE, 2, memory_mib=20_390))) == {"milli": 2}


def test_the_chosen_devices_say_which_models_are_charged() -> None:
    mixed = replace(node(""), devices=(Device("H100-80"), Device("A100-40"), Device("A100-40")))
    asked = request(DeviceAsk(Kind.WHOLE, 2))
    assert charge_of(asked, MODELS, mixed) == {"gpu": 2, "H100": 1, "H100-80": 1, "A100": 2}, "may be any of them"
    assert charge_of(asked, MODELS, mixed, (1, 2)) == {"gpu": 2, "A100": 2}
    assert charge_of(asked, MODELS, mixed, (0, 2)) == {"gpu": 2, "H100": 1, "H100-80": 1, "A100": 1}


def test_a_node_that_tells_only_its_product_is_charged_by_that() -> None:
    bare = Node("u", "n", "1", Mode.OBSERVED, Amounts(), 110, gpus=4, product="NVIDIA-A100-SXM4-80GB")
    assert charge_of(request(DeviceAsk(Kind.WHOLE, 4)), MODELS, bare) == {"gpu": 4, "A100": 4}


def test_an_allocation_alone_tells_what_is_held() -> None:
    whole = Grant("whole", dev=3)
    held = Allocation(
        "id",
        1,
        1,
        "n",
        "exact",
        (("a", (whole, Grant("mig", dev=1, profile="1g.10gb", start=0, size=1))), ("b", (whole,))),
    )
    assert charge_of_allocation(10, 20, held) == {"gpu": 1, "mig:1g.10gb": 1, "cpu": 10, "memory": 20}
    counted = Allocation("id", 1, 1, "n", "observed", (("a", (Grant("whole", count=4),)),))
    assert charge_of_allocation(0, 0, counted) == {"gpu": 4}
    shares = Allocation("id", 1, 1, "n", "exact", (("a", (Grant("share", dev=0, milli=100, mib=9),)),) * 2)
    assert charge_of_allocation(0, 0, shares) == {"milli": 200}
    assert charge_of_allocation(1, 0, None) == {"cpu": 1}


kinds = st.sampled_from(
    [
        DeviceAsk(Kind.WHOLE, 3),
        DeviceAsk(Kind.MIG, 2, profile="1g.10gb"),
        DeviceAsk(Kind.SHARE, 2, memory_mib=999),
        DeviceAsk(Kind.SHARE, 2, milli=7),
        DeviceAsk(),
    ]
)


@given(
    devices=kinds, product=st.sampled_from([PRODUCT, "NVIDIA-A100-SXM4-80GB", "Tesla-T4", ""]), cpu=st.integers(0, 9)
)
def test_a_candidate_never_costs_less_than_what_was_known_before(devices: DeviceAsk, product: str, cpu: int) -> None:
    asked = request(devices, cpu=cpu)
    before, after = charge_of(asked, MODELS), charge_of(asked, MODELS, node(product))
    assert all(after.get(key, 0) >= amount for key, amount in before.items())
    assert after.keys() - before.keys() <= set(MODELS)
