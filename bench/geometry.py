"""Which MIG instances a GPU can hold, read from the published table as data: an auditor's own reading of it.

Only the file is shared with Tessera, not a line of code. Profile names are those that pods ask for, with "+".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).resolve().parent.parent / "scheduler" / "model" / "mig-geometry.yaml"
MIG = "nvidia.com/mig-"


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of instance on one kind of card.

    Attributes:
        name: the table's own name, the same on every model.
        size: memory slices.
        starts: memory slices at which one may start.
        most: instances of it on one card.
        media: engines that one takes.
    """

    name: str
    size: int
    starts: tuple[int, ...]
    most: int
    media: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Card:
    """How one GPU model divides.

    Attributes:
        key: the table's key, such as `H100-80`.
        slices: memory slices of the card.
        engines: its media engines.
        profiles: profile name -> shape, every alias.
        names: the first name of each shape.
    """

    key: str
    slices: int
    engines: Mapping[str, int]
    profiles: Mapping[str, Shape]
    names: tuple[str, ...]

    def profile_of(self, resource: str) -> str:
        """Return the profile that a resource names; empty when this model has none of that name."""
        return next((name for name in self.profiles if resource_of(name) == resource), "")


def resource_of(profile: str) -> str:
    """Return the resource that pods ask for, such as `nvidia.com/mig-1g.10gb.me`."""
    return MIG + profile.replace("+", ".")


def plain(product: str) -> str:
    """Return a product label without what sharing and MIG strategy `single` append to it."""
    return product.removesuffix("-SHARED").partition("-MIG-")[0]


def card(product: str) -> Card | None:
    """Return how the product of a node label divides; None when it cannot, or is not in the table."""
    return _cards().get(plain(product).lower())


@functools.cache
def _cards() -> dict[str, Card]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    found: dict[str, Card] = {}
    for key, gpu in table["gpus"].items():
        one = _card(key, gpu["names"], table["families"][gpu["family"]])
        found |= {product.lower(): one for product in gpu["product"]}
    return found


def _card(key: str, names: Mapping[str, str | list[str]], family: Mapping[str, Any]) -> Card:
    profiles: dict[str, Shape] = {}
    first = []
    for shape, _, _, _, size, most, starts, media in family["shapes"]:
        called = names.get(shape, [])
        aliases = [called] if isinstance(called, str) else called
        first += aliases[:1]
        profiles |= dict.fromkeys(aliases, Shape(shape, size, tuple(starts), most, media))
    return Card(key, family["memSlices"], family["engines"], profiles, tuple(first))
