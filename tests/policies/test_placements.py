"""The tables of MIG placements against the rules themselves, enumerated by hand."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import yaml

from policies.placements import FREE_WEIGHT, Family, Placements, Shape, States
from scheduler import geometry

RAW: dict[str, Any] = yaml.safe_load(files("scheduler.model").joinpath("mig-geometry.yaml").read_text())
TABLES = geometry.placements()
Held = frozenset[tuple[str, int]]
OF_FAMILY = {"eight": "H100-80", "a30": "A30-24", "gb202": "RTXPRO6000"}


def legal(family: str, held: Held) -> bool:
    """Whether these instances can be on one GPU together, by every rule of the table."""
    raw = RAW["families"][family]
    rows = {row[0]: row for row in raw["shapes"]}
    taken = [slice_ for shape, start in held for slice_ in range(start, start + rows[shape][4])]
    if len(taken) != len(set(taken)) or max(taken, default=0) >= raw["memSlices"]:
        return False
    if any(start not in rows[shape][6] for shape, start in held):
        return False
    if sum(rows[shape][3] for shape, _ in held) > raw["computeSlices"]:
        return False
    if any(count > rows[shape][5] for shape, count in Counter(shape for shape, _ in held).items()):
        return False
    return all(sum(rows[shape][7].get(name, 0) for shape, _ in held) <= room for name, room in raw["engines"].items())


def instances(family: str) -> list[tuple[str, int]]:
    return [(row[0], start) for row in RAW["families"][family]["shapes"] for start in row[6]]


@cache
def reachable(family: str) -> dict[Held, frozenset[tuple[str, int]]]:
    """Every legal set of instances, and which one instance may follow it."""
    found: dict[Held, frozenset[tuple[str, int]]] = {}
    todo: list[Held] = [frozenset()]
    while todo:
        held = todo.pop()
        if held in found:
            continue
        more = frozenset(one for one in instances(family) if one not in held and legal(family, held | {one}))
        found[held] = more
        todo += [held | {one} for one in more]
    return found


def occupancy(family: str, held: Held) -> int:
    shapes = geometry.families()[family].shapes
    return sum((1 << shapes[shape].size) - 1 << start for shape, start in held)


def engines(family: str, held: Held) -> list[int]:
    shapes = geometry.families()[family].shapes
    return [sum(used) for used in zip(*(shapes[shape].engines for shape, _ in held), strict=True)] or [0] * len(
        geometry.families()[family].engines
    )


def state(family: str, held: Held) -> int:
    return TABLES.families[family].state(occupancy(family, held), engines(family, held))


@pytest.mark.parametrize("family", OF_FAMILY)
def test_the_tables_reach_what_is_known_to_exist(family: str) -> None:
    states = TABLES.families[family]
    found: dict[Held, int] = {}
    todo: list[tuple[Held, int]] = [(frozenset(), 0)]
    maximal: list[Held] = []
    while todo:
        held, number = todo.pop()
        if held in found:
            assert found[held] == number, "a state does not depend on the order in which instances came"
            continue
        found[held] = number
        more = [
            (held | {(name, start)}, int(then))
            for name, shape in states.family.shapes.items()
            for start, then in zip(shape.starts, states.after[name][number], strict=True)
            if then >= 0
        ]
        todo += more
        if not more:
            maximal.append(held)
    counts = {
        "states": len(found),
        "maximal": len(maximal),
        "multisets": len({tuple(sorted(shape for shape, _ in held)) for held in maximal}),
        "masks": len({occupancy(family, held) for held in found}),
    }
    assert counts == RAW["families"][family]["expect"]


@pytest.mark.parametrize("family", OF_FAMILY)
def test_every_table_entry_is_what_the_rules_say(family: str) -> None:
    """Compute slices and counts per shape need no look-up of their own: starts and engines imply them."""
    states = TABLES.families[family]
    for held, more in reachable(family).items():
        number = state(family, held)
        for name, shape in states.family.shapes.items():
            starts = [start for start in shape.starts if (name, start) in more]
            after = states.after[name][number].tolist()
            assert [start for start, then in zip(shape.starts, after, strict=True) if then >= 0] == starts
            assert all(
                then == state(family, held | {(name, start)})
                for start, then in zip(shape.starts, after, strict=True)
                if then >= 0
            )
            most = next(
                count
                for count in range(len(starts), -1, -1)
                for some in combinations(starts, count)
                if legal(family, held | {(name, start) for start in some})
            )
            assert states.fits[name][number] == most


def loss(model: str, held: Held, weights: dict[str, float]) -> float:
    """Slices of a GPU that are free and that the next ask cannot use, of all, on the average of the next ask."""
    family = TABLES.models[model].family
    total = RAW["families"][family]["memSlices"]
    free = total - occupancy(family, held).bit_count()
    shapes = {row[0]: row[4] for row in RAW["families"][family]["shapes"]}
    lost = 0.0
    for shape, size in shapes.items():
        starts = [start for name, start in reachable(family)[held] if name == shape]
        fits = max(
            (
                n
                for n in range(len(starts) + 1)
                for c in combinations(starts, n)
                if legal(family, held | {(shape, s) for s in c})
            ),
            default=0,
        )
        lost += weights[shape] * (free - size * fits)
    return lost / total


@pytest.mark.parametrize("model", OF_FAMILY.values())
@pytest.mark.parametrize("mix", ["alike", "small"])
def test_the_best_start_loses_least(model: str, mix: str) -> None:
    profiles, family = TABLES.models[model].profiles, TABLES.models[model].family
    shapes = list(dict.fromkeys(profiles.values()))
    weights = dict.fromkeys(shapes, 1 / len(shapes))
    tables = TABLES
    if mix == "small":
        weights = {shape: float(shape == "1g") for shape in shapes}
        tables = TABLES.weighed({name: 7.0 for name, shape in profiles.items() if shape == "1g"})
    some = sorted(reachable(family), key=sorted)[::23]
    for name, shape in profiles.items():
        offer, size = tables.offer(name, []), geometry.families()[family].shapes[shape].size
        for held in some:
            row = tables.row(model, occupancy(family, held), engines(family, held))
            starts = [start for kind, start in sorted(reachable(family)[held]) if kind == shape]
            assert (offer.start[row] >= 0) == bool(starts) == (offer.worth[row] > 0)
            if not starts:
                continue
            costs = {start: loss(model, held | {(shape, start)}, weights) for start in starts}
            assert offer.start[row] in starts
            assert costs[int(offer.start[row])] == pytest.approx(min(costs.values()))
            assert offer.start[row] == min(
                s for s in starts if costs[s] == pytest.approx(min(costs.values()), abs=1e-8)
            )
            total = RAW["families"][family]["memSlices"]
            free = total - occupancy(family, held).bit_count()
            cost = min(costs.values()) - loss(model, held, weights) + FREE_WEIGHT * free / total
            assert offer.worth[row] == pytest.approx((1.3 - cost) / 2.3, abs=1e-6)
            assert offer.sizes[row] == size
            then = held | {(shape, int(offer.start[row]))}
            assert offer.after[row] == tables.row(model, occupancy(family, then), engines(family, then))


def test_one_instance_more_is_one_place_less_everywhere() -> None:
    for profile in {name for model in TABLES.models.values() for name in model.profiles}:
        offer = TABLES.offer(profile, [])
        rows = np.flatnonzero(offer.fits)
        assert rows.size
        assert (offer.fits[offer.after[rows]] == offer.fits[rows] - 1).all()
        assert offer.fits[0] == 0
        assert ((offer.worth > 0) == (offer.fits > 0)).all()
        assert (offer.worth <= 1).all()


def test_a_name_means_another_shape_on_another_model() -> None:
    sizes = {model: shape.size for model in TABLES.models if (shape := TABLES.shape(model, "1g.10gb"))}
    assert sizes == {"A100-40": 2, "A100-80": 1, "H100-80": 1}
    assert TABLES.offer("1g.10gb", ["", "A100-40", "T4", "H100-80", "A30-24"]).slots.tolist() == [0, 4, 0, 7, 0]
    assert TABLES.shape("T4", "1g.10gb") is None
    both = {TABLES.models["A100-80"].profiles[name] for name in ("7g.80gb", "7g.79gb")}
    assert both == {"7g"}


def test_what_is_too_much_is_all() -> None:
    assert TABLES.row("T4", 0, ()) == 0
    full = TABLES.row("RTXPRO6000", 0xFFFF, (9, 9))
    assert full == TABLES.row("RTXPRO6000", 0xFFF, (4, 1))
    assert all(TABLES.offer(name, []).fits[full] == 0 for name in TABLES.models["RTXPRO6000"].profiles)
    assert TABLES.row("RTXPRO6000", 0b10, (0, 0)) == TABLES.row("RTXPRO6000", 0b111, (0, 0)), "part of a granule is all"


@pytest.mark.parametrize(
    ("wish", "models", "names"),
    [
        pytest.param("1g.12gb", ["H100-80"], ("1g.10gb", "1g.10gb+me", "1g.20gb"), id="nearest memory"),
        pytest.param("3g.40gb", ["A100-40", "T4"], ("3g.20gb", "4g.20gb", "2g.10gb"), id="another model's name"),
        pytest.param("1g.6gb-me", ["A30-24"], ("1g.6gb", "1g.6gb+me", "2g.12gb"), id="another suffix"),
        pytest.param("nonsense", ["A30-24"], ("1g.6gb", "1g.6gb+me", "2g.12gb"), id="no name at all"),
        pytest.param("1g.10gb", ["T4"], (), id="no model with MIG"),
    ],
)
def test_nearest_legal_names(wish: str, models: list[str], names: tuple[str, ...]) -> None:
    assert TABLES.nearest(wish, models) == names


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (Shape(2, (0, 1), (0,)), "placements overlap"),
        (Shape(2, (0, 3), (0,)), "multiples of 2"),
        (Shape(3, (0,), (0,)), "multiples of 2"),
    ],
)
def test_a_geometry_that_breaks_the_rules_is_refused(shape: Shape, says: str) -> None:
    granule = 1 if "overlap" in says else 2
    with pytest.raises(ValueError, match=says):
        States(Family(8, granule, (1,), {"odd": shape}))


def test_no_models_no_rows() -> None:
    nothing = Placements({}, {})
    assert nothing.rows == 1
    assert nothing.offer("1g.10gb", ["H100-80"]).fits.tolist() == [0]
    assert nothing.family("H100-80") == -1
