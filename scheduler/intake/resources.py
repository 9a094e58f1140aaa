"""Names of device resources, and the MIG profile behind `nvidia.com/mig-<profile>`."""

from __future__ import annotations

import re

from scheduler import GPU, MIG_PREFIX, SHARE

DEVICES_MAX = 64  # on one node
_MIG = re.compile(r"([1-9][0-9]?g\.[1-9][0-9]{0,3}gb)(?:\.(me|me\.all|gfx)|(-me))?")


def is_device(resource: str) -> bool:
    """Say whether this resource counts devices, slices or shares of GPUs."""
    return resource in {GPU, SHARE} or resource.startswith(MIG_PREFIX)


def profile_of(resource: str) -> str:
    """Return the MIG profile a resource counts, with "+" where the resource has "."; empty when it is none.

    `nvidia.com/mig-1g.10gb.me` counts `1g.10gb+me`, `nvidia.com/mig-1g.24gb-me` counts `1g.24gb-me`.
    """
    found = _MIG.fullmatch(resource.removeprefix(MIG_PREFIX)) if resource.startswith(MIG_PREFIX) else None
    if found is None:
        return ""
    size, plus, minus = found.groups()
    return f"{size}+{plus}" if plus else size + (minus or "")
