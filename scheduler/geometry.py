"""The tables of GPU models that ship with the package: read once, from the package's own data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from policies.placements import Family, Model, Placements, Shape, States


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(
        files("scheduler.model").joinpath("mig-geometry.yaml").read_text(encoding="utf-8")
    )
    return table


@lru_cache(maxsize=1)
def products() -> Mapping[str, str]:
    """Return product label -> key of the table, such as `NVIDIA-H100-PCIe` -> `H100-80`."""
    return MappingProxyType({label: key for key, gpu in _table()["gpus"].items() for label in gpu["product"]})


@lru_cache(maxsize=1)
def families() -> Mapping[str, Family]:
    """Return the MIG geometries by name."""
    return MappingProxyType({name: _family(raw) for name, raw in _table()["families"].items()})


def models() -> dict[str, Model]:
    """Return each model's geometry and profile names; where drivers differ, every name."""
    return {key: Model(gpu["family"], _profiles(gpu["names"])) for key, gpu in _table()["gpus"].items()}


@lru_cache(maxsize=1)
def placements() -> Placements:
    """Return the tables of where MIG instances fit, all profiles asked alike."""
    return Placements({name: States(family) for name, family in families().items()}, models())


def _family(raw: Mapping[str, Any]) -> Family:
    engines: dict[str, int] = raw["engines"]
    shapes = {
        name: Shape(size, tuple(starts), tuple(media.get(engine, 0) for engine in engines))
        for name, _, _, _, size, _, starts, media in raw["shapes"]
    }
    return Family(raw["memSlices"], raw["granule"], tuple(engines.values()), shapes)


def _profiles(names: Mapping[str, str | list[str]]) -> dict[str, str]:
    return {name: shape for shape, known in names.items() for name in (known if isinstance(known, list) else [known])}
