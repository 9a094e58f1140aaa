"""The oracle's own reading of the geometry, and what fits on a device, against plain enumeration."""

from __future__ import annotations

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.devices import SHARE, Ask, Device, devices_of, mig_devices, slice_faults
from bench.devices import fits as devices_fit
from bench.geometry import TABLE, Card, card, resource_of

PRODUCTS = {
    "eight": "NVIDIA-H100-80GB-HBM3",
    "a30": "NVIDIA-A30",
    "gb202": "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
}
H100 = PRODUCTS["eight"]


def known(product: str) -> Card:
    found = card(product)
    assert found is not None
    return found


def grants(model: Card, profile: str) -> list[dict[str, object]]:
    shape = model.profiles[profile]
    return [{"kind": "mig", "profile": profile, "start": start, "size": shape.size} for start in shape.starts]


def fits(model: Card, held: list[dict[str, object]]) -> bool:
    device = Device(model, mig=True, size_mib=0)
    ends = sorted((int(str(one["start"])), int(str(one["start"])) + int(str(one["size"]))) for one in held)
    for one in held:
        device.take(one)
    return not list(device.faults()) and all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("family", PRODUCTS)
def test_reachable_states_are_as_many_as_the_table_expects(family: str) -> None:
    expected = yaml.safe_load(TABLE.read_text())["families"][family]["expect"]["states"]
    model = known(PRODUCTS[family])
    places = [one for profile in model.names for one in grants(model, profile)]
    seen, edge = {frozenset[int]()}, [frozenset[int]()]
    while edge:
        state = edge.pop()
        for number in range(len(places)):
            grown = state | {number}
            if grown not in seen and fits(model, [places[one] for one in grown]):
                seen.add(grown)
                edge.append(grown)
    assert len(seen) == expected


@given(data=st.data(), family=st.sampled_from(sorted(PRODUCTS)))
def test_room_is_the_most_that_enumeration_finds(data: st.DataObject, family: str) -> None:
    model = known(PRODUCTS[family])
    places = [one for profile in model.names for one in grants(model, profile)]
    held: list[dict[str, object]] = []
    for one in data.draw(st.lists(st.sampled_from(places), max_size=5)):
        if fits(model, [*held, one]):
            held.append(one)
    profile = data.draw(st.sampled_from(model.names))
    more = grants(model, profile)
    most = max(
        count
        for count in range(len(more) + 1)
        for chosen in itertools.combinations(more, count)
        if fits(model, [*held, *chosen])
    )
    device = Device(model, mig=True, size_mib=0)
    for one in held:
        device.take(one)
    assert device.room(Ask(resource_of(profile), 1)) == most


def served(rooms: list[int], parts: tuple[int, ...]) -> bool:
    """Try every choice of different devices for every container."""
    if not parts:
        return True
    for chosen in itertools.combinations(range(len(rooms)), parts[0]):
        left = [room - (dev in chosen) for dev, room in enumerate(rooms)]
        if min(left, default=0) >= 0 and served(left, parts[1:]):
            return True
    return False


TENTHS = (0, 0, 4, 5, 6, 8, 10)


@settings(max_examples=500)
@given(
    taken=st.lists(st.tuples(st.sampled_from(TENTHS), st.sampled_from(TENTHS)), max_size=4).map(
        lambda drawn: [(100 * milli, 1000 * mib) for milli, mib in drawn]
    ),
    parts=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    size=st.tuples(st.sampled_from([0, 200, 250, 400]), st.sampled_from([0, 2000, 3000])).filter(any),
)
def test_shares_of_containers_fit_where_some_choice_of_devices_serves_them_all(
    taken: list[tuple[int, int]], parts: tuple[int, ...], size: tuple[int, int]
) -> None:
    devices = [Device(None, mig=False, size_mib=10_000) for _ in taken]
    for device, (milli, mib) in zip(devices, taken, strict=True):
        device.take({"kind": "share", "milli": milli, "mib": mib})
    milli, mib = size[0] or size[1] // 10, size[1] or size[0] * 10
    rooms = [min((1000 - used) // milli, (10_000 - held) // mib) for used, held in taken]
    asked = Ask(SHARE, sum(parts), milli=size[0], mib=size[1], parts=parts)
    assert devices_fit(devices, asked) is served(rooms, parts)
    apart = Ask(SHARE, sum(parts), milli=size[0], mib=size[1])
    assert devices_fit(devices, apart) is served(rooms, (sum(parts),))


@pytest.mark.parametrize(
    ("written", "devices"),
    [("none", set()), ("all", {0, 1, 2, 3}), ("0,2-3", {0, 2, 3}), ("0.2-3", {0, 2, 3}), ("1_3", {1, 3})],
)
def test_labels_of_mig_devices(written: str, devices: set[int]) -> None:
    assert mig_devices(written, 4) == devices


@pytest.mark.parametrize(
    ("product", "profile", "start", "size", "fault"),
    [
        (H100, "3g.40gb", 4, 4, ""),
        (H100, "3g.40gb", 2, 4, "must not start"),
        (H100, "3g.40gb", 4, 3, "of size 3"),
        (H100, "3g.20gb", 4, 4, "no profile"),
        ("NVIDIA-A100-SXM4-40GB", "3g.20gb", 4, 4, ""),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", "1g.10gb+me", 6, 1, ""),
        ("Tesla-T4", "1g.10gb", 0, 1, "no profile"),
    ],
)
def test_legal_slices(product: str, profile: str, start: int, size: int, fault: str) -> None:
    wrong = slice_faults(card(product), {"profile": profile, "start": start, "size": size})
    assert fault in wrong
    assert bool(fault) == bool(wrong)


@pytest.mark.parametrize(
    ("ask", "device_mib", "takes"),
    [
        (Ask(SHARE, 1, mib=1024), 10240, (100, 1024)),
        (Ask(SHARE, 1, mib=1), 81559, (1, 1)),
        (Ask(SHARE, 1, mib=1000), 81559, (12, 1000)),
        (Ask(SHARE, 1, milli=333), 81559, (333, 27159)),
        (Ask(SHARE, 1, milli=1), 500, (1, 1)),
        (Ask(SHARE, 1, milli=100, mib=5), 81559, (100, 5)),
        (Ask(SHARE, 1, milli=100), 0, (100, 1)),
        (Ask(SHARE, 1, mib=100), 0, None),
    ],
)
def test_the_size_of_a_share(ask: Ask, device_mib: int, takes: tuple[int, int] | None) -> None:
    assert ask.share_of(device_mib) == takes


def test_a_device_has_one_use() -> None:
    labels = {"nvidia.com/gpu.product": H100, "nvidia.com/gpu.memory": "1000", "tessera.dev/mig-devices": "1"}
    whole, share, piece = Ask("nvidia.com/gpu", 1), Ask(SHARE, 1, milli=400), Ask("nvidia.com/mig-1g.10gb", 1)
    plain, divided = devices_of(labels, 2)
    assert [plain.room(whole), plain.room(share), plain.room(piece)] == [1, 1, 0]
    assert [divided.room(whole), divided.room(share), divided.room(piece)] == [0, 0, 7]
    for _ in range(2):
        plain.take({"kind": "share", "milli": 400, "mib": 400})
    assert [plain.room(whole), plain.room(share), plain.room(Ask(SHARE, 1, milli=200))] == [0, 0, 1]
    assert not list(plain.faults())
    plain.take({"kind": "share", "milli": 100, "mib": 201})
    assert "beyond its size" in " ".join(plain.faults())
