"""The table of GPU models that ships with the package: read once, from the package's own data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

import yaml


@lru_cache(maxsize=1)
def products() -> Mapping[str, str]:
    """Return product label -> key of the table, such as `NVIDIA-H100-PCIe` -> `H100-80`."""
    table = yaml.safe_load(files("scheduler.model").joinpath("mig-geometry.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({label: key for key, gpu in table["gpus"].items() for label in gpu["product"]})
