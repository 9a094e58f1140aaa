"""MIG profiles and shares in numbers, against the codes of a live inventory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies.columns import Ask, Kind
from scheduler import geometry
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.inventory.asks import Asks
from scheduler.inventory.registry import Registry
from scheduler.model.pod import Request
from tests.objects import raw_node, raw_pod

PRODUCTS = {"h": "NVIDIA-H100-80GB-HBM3", "a": "NVIDIA-A100-SXM4-40GB", "t": "Tesla-T4"}


@pytest.fixture
def asks() -> Asks:
    registry = Registry(geometry.placements())
    for name, product in PRODUCTS.items():
        raw = raw_node(name, product=product)
        raw["status"]["allocatable"]["nvidia.com/mig-1g.10gb"] = "7"
        node = read_node(raw, geometry.products())
        assert node is not None
        registry.put_node(node)
    return Asks(registry)


def request(resource: str, *counts: int, init: int = 0, **annotations: str) -> Request:
    raw = raw_pod("p", 0)
    (app,) = raw["spec"]["containers"]

    def container(name: str, count: int) -> dict[str, Any]:
        return app | {"name": name, "resources": {"limits": {"cpu": "1", resource: str(count)}}}

    raw["spec"]["containers"] = [container(f"c{i}", count) for i, count in enumerate(counts)]
    raw["spec"]["initContainers"] = [container("i", init)] if init else []
    raw["metadata"]["annotations"] = {f"tessera.dev/gpu-{key}": value for key, value in annotations.items()}
    made = read_pod(raw).request
    assert made.refusal is None
    return made


def slots(asks: Asks, ask: Ask) -> dict[str, int]:
    names = (name.partition("|")[0] for name in asks.registry.columns.models.names)
    return dict(zip(names, ask.offer.slots.tolist(), strict=True))


def test_a_profile_is_another_shape_on_another_model(asks: Asks) -> None:
    ask = asks.ask(request("nvidia.com/mig-1g.10gb", 2))
    assert (ask.kind, ask.count) == (Kind.MIG, 2)
    assert slots(asks, ask) == {"": 0, "H100-80": 7, "A100-40": 4, "Tesla-T4": 0}
    assert asks.registry.snapshot().slices_total[ask.profile].tolist() == [7, 7, 7]
    assert ask.offer.fits.any()


def test_an_unknown_profile_fits_nowhere_and_names_its_neighbours(asks: Asks) -> None:
    wanted = request("nvidia.com/mig-1g.11gb", 1)
    ask = asks.ask(wanted)
    assert not ask.offer.fits.any()
    assert asks.registry.snapshot().slices_total[ask.profile].tolist() == [0, 0, 0]
    assert asks.nearest(wanted) == ("1g.10gb", "1g.10gb+me", "1g.5gb")
    assert asks.nearest(request("nvidia.com/mig-1g.11gb", 1, model="A100")) == ("1g.10gb", "1g.5gb", "1g.5gb+me")
    assert asks.nearest(request("nvidia.com/mig-1g.11gb", 1, model="T4")) == ()
    assert asks.nearest(request("nvidia.com/gpu", 1)) == ()


def test_an_offer_knows_models_that_come_later(asks: Asks) -> None:
    wanted = request("nvidia.com/mig-1g.6gb", 1)
    assert not any(slots(asks, asks.ask(wanted)).values())
    node = read_node(raw_node("late", product="NVIDIA-A30"), geometry.products())
    assert node is not None
    asks.registry.put_node(node)
    assert slots(asks, asks.ask(wanted))["A30-24"] == 4


def test_another_mix_moves_the_best_start(asks: Asks) -> None:
    wanted = request("nvidia.com/mig-1g.10gb", 1)
    before = asks.ask(wanted).offer
    asks.weigh({"1g.10gb": 1.0})
    after = asks.ask(wanted).offer
    assert np.array_equal(before.fits, after.fits)
    assert not np.array_equal(before.worth, after.worth)


@pytest.mark.parametrize(
    ("counts", "init", "sizes", "expected"),
    [
        pytest.param((2,), 0, {"memory": "10Gi"}, (0, 10240, (2,)), id="memory"),
        pytest.param((1, 2), 0, {"milli": "300"}, (300, 0, (1, 2)), id="time, two containers"),
        pytest.param((1,), 0, {"milli": "300", "memory": "1Gi"}, (300, 1024, (1,)), id="both"),
        pytest.param((1, 2), 1, {"milli": "300"}, (300, 0, (3,)), id="an init container reuses them: all apart"),
    ],
)
def test_sizes_of_shares(
    asks: Asks, counts: tuple[int, ...], init: int, sizes: dict[str, str], expected: tuple[int, int, tuple[int, ...]]
) -> None:
    ask = asks.ask(request("tessera.dev/share", *counts, init=init, **sizes))
    assert (ask.device_milli, ask.device_mib, ask.parts) == expected
    assert ask.kind == Kind.SHARE
