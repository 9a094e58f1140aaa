"""What agents report, in the inventory: facts replace labels, silence closes, what is left out is not free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import Health, Use
from scheduler.inventory.registry import AUDITED, Registry, Source, booking
from scheduler.model.node import Seen, Sighting
from tests.inventory.test_registry import TABLES, holding, node, pod

GPUS = 4


def seen(slot: int, *, health: Health = Health.HEALTHY, mig: bool = False, uuid: str = "") -> Seen:
    return Seen(slot, uuid or f"GPU-{slot}", health, mig, numa=slot // 2, link_group=0)


ALL_WELL = Sighting(tuple(seen(slot) for slot in range(GPUS)), "580")


def registry_of(**how: object) -> Registry:
    registry = Registry(TABLES)
    registry.put_node(node("a", gpus=GPUS, **how))  # type: ignore[arg-type]
    return registry


def column(registry: Registry, name: str) -> list[int]:
    return list(getattr(registry.snapshot(), name)[:GPUS, registry.columns.rows["a"]].tolist())


def closed(registry: Registry) -> bool:
    return bool(registry.snapshot().foreign[registry.columns.rows["a"]])


def test_a_report_tells_what_labels_do_not() -> None:
    registry = registry_of(mig="all")
    told = Sighting((seen(0, mig=True), seen(1, health=Health.DRAINING), seen(3)), "580.65")
    assert registry.hear("a", told)
    assert column(registry, "mig_mode") == [1, 0, 1, 0], "of a GPU that is not in the report the label still counts"
    assert column(registry, "health") == [Health.HEALTHY, Health.DRAINING, Health.BAD, Health.HEALTHY]
    assert column(registry, "numa") == [0, 0, -1, 1]
    assert column(registry, "link_group") == [0, 0, -1, 0]
    assert [one.uuid for one in registry.nodes["a"].devices] == ["GPU-0", "GPU-1", "", "GPU-3"]
    assert registry.nodes["a"].driver == "580.65"
    assert registry.differences("a") == []


def test_the_same_again_changes_nothing() -> None:
    registry = registry_of()
    assert registry.hear("a", ALL_WELL)
    generation, freed, layout = registry.generation, registry.freed, registry.columns.layout
    assert not registry.hear("a", ALL_WELL)
    assert not registry.put_node(node("a", gpus=GPUS)), "a heartbeat of the Node object neither"
    assert (registry.generation, registry.freed, registry.columns.layout) == (generation, freed, layout)


def test_an_observed_node_keeps_its_plugins_count_of_mig() -> None:
    registry = registry_of(mode="observed")
    registry.hear("a", Sighting((seen(0, mig=True), seen(1, health=Health.BAD))))
    assert column(registry, "mig_mode") == [0, 0, 0, 0]
    assert column(registry, "health") == [Health.HEALTHY, Health.BAD, Health.BAD, Health.BAD]


def test_a_report_frees_nothing_that_is_held() -> None:
    registry = registry_of()
    registry.say("u", Source.CLAIMED, booking(pod("u", gpus=2), "a", holding(0, 1)))
    before = column(registry, "use")
    registry.hear("a", Sighting((seen(2), seen(3))))
    registry.hear("a", ALL_WELL)
    registry.hush("a")
    assert column(registry, "use") == before == [Use.WHOLE, Use.WHOLE, Use.FREE, Use.FREE]
    assert registry.differences("a") == []


def test_silence_closes_until_a_report_comes() -> None:
    registry = registry_of()
    assert not registry.hush("a"), "it never had an agent"
    assert not closed(registry)
    registry.hear("a", ALL_WELL)
    assert registry.hush("a")
    assert not registry.hush("a")
    assert closed(registry)
    assert registry.differences("a") == []
    registry.put_node(node("a", gpus=GPUS, x="y"))
    assert closed(registry), "the Node object is no report"
    assert registry.hear("a", ALL_WELL)
    assert not closed(registry)


def test_silence_leaves_observed_nodes_to_their_plugin() -> None:
    registry = registry_of(mode="observed")
    registry.hear("a", ALL_WELL)
    registry.hush("a")
    assert not closed(registry)


@pytest.mark.parametrize("way", ["replaced", "removed first"])
def test_another_machine_of_the_same_name_starts_without_a_report(way: str) -> None:
    registry = registry_of()
    registry.hear("a", Sighting())
    registry.hush("a")
    if way == "removed first":
        registry.remove_node("a", "uid-a")
    assert registry.put_node(node("a", gpus=GPUS, uid="another"))
    assert column(registry, "health") == [Health.HEALTHY] * GPUS
    assert not closed(registry)
    assert not registry.hush("a")


def test_a_report_of_an_unknown_node_is_an_error() -> None:
    with pytest.raises(KeyError):
        Registry(TABLES).hear("a", ALL_WELL)


def test_what_is_reserved_is_handed_out_only_while_it_is_well() -> None:
    registry = registry_of()
    registry.hear("a", ALL_WELL)
    registry.say("u", Source.CLAIMED, booking(pod("u", gpus=1), "a", holding(1)))
    assert registry.unsound("u", "a") == ""
    registry.hear("a", Sighting((seen(0, health=Health.BAD), seen(1), seen(2), seen(3))))
    assert registry.unsound("u", "a") == "", "another GPU is not its business"
    registry.hear("a", Sighting((seen(0), seen(1, health=Health.SUSPECT), seen(2), seen(3))))
    assert registry.unsound("u", "a") == "GpuUnhealthy"
    assert registry.unsound("u", "b") == registry.unsound("v", "a") == ""
    registry.hush("a")
    assert registry.unsound("u", "a") == "InventoryStale"


SEEN = st.builds(seen, st.just(0), health=st.sampled_from(Health), mig=st.booleans())
SIGHTINGS = st.lists(SEEN | st.none(), min_size=GPUS, max_size=GPUS).map(
    lambda each: Sighting(
        tuple(Seen(slot, f"GPU-{slot}", one.health, one.mig_mode) for slot, one in enumerate(each) if one is not None)
    )
)


class Told:
    """A registry, and the last of each thing that it was told."""

    def __init__(self) -> None:
        self.registry = Registry(TABLES)
        self.mig, self.uid, self.silent = "none", "uid-a", False
        self.last: Sighting | None = None
        self.node()

    def node(self) -> None:
        self.registry.put_node(node("a", gpus=GPUS, mig=self.mig, uid=self.uid))

    def hear(self, data: st.DataObject) -> None:
        self.last, self.silent = data.draw(SIGHTINGS), False
        self.registry.hear("a", self.last)

    def hush(self, _: st.DataObject) -> None:
        self.silent = self.last is not None
        self.registry.hush("a")

    def label(self, data: st.DataObject) -> None:
        self.mig = data.draw(st.sampled_from(["none", "all", "1-2"]))
        self.node()

    def book(self, data: st.DataObject) -> None:
        self.registry.say("u", Source.CLAIMED, booking(pod("u"), "a", holding(data.draw(st.integers(0, 3)))))

    def free(self, _: st.DataObject) -> None:
        self.registry.unsay("u", Source.CLAIMED)

    def replace(self, _: st.DataObject) -> None:
        self.uid, self.last, self.silent = self.uid + "x", None, False
        self.node()


@given(st.data())
def test_any_order_of_events_equals_the_last_of_each(data: st.DataObject) -> None:
    told, twin = Told(), Told()
    registry = told.registry
    for _ in range(data.draw(st.integers(1, 12))):
        event = data.draw(st.sampled_from([told.hear, told.hear, told.hush, told.label, told.book, told.free]))
        data.draw(st.sampled_from([event, event, told.replace]))(data)
        assert registry.differences("a") == []
    twin.mig, twin.uid = told.mig, told.uid
    twin.node()
    if told.last is not None:
        twin.registry.hear("a", told.last)
    if told.silent:
        twin.registry.hush("a")
    held = registry.held("u")
    if held is not None:
        twin.registry.say("u", Source.CLAIMED, held)
    for name in AUDITED:
        mine, other = (getattr(one.snapshot(), name)[..., one.columns.rows["a"]] for one in (registry, twin.registry))
        assert np.array_equal(mine, other), name
