"""What a bound pod holds: the content of the annotation `tessera.dev/allocation`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """One device of an exact node, or a count of one kind on an observed node.

    Attributes:
        kind: `whole`, `mig` or `share`.
        dev: device index on the node; -1 on observed nodes.
        count: how many on observed nodes; 1 on exact nodes.
        uuid: device UUID once a report named it, else empty.
        profile, start, size: MIG only; start and size in memory slices, -1 and 0 otherwise.
        milli, mib: shares only, 0 otherwise.
    """

    kind: str
    dev: int = -1
    count: int = 1
    uuid: str = ""
    profile: str = ""
    start: int = -1
    size: int = 0
    milli: int = 0
    mib: int = 0


@dataclass(frozen=True, slots=True)
class Allocation:
    """Node and devices of one Request in one epoch; containers in declaration order."""

    id: str
    epoch: int
    fence: int
    node: str
    mode: str  # `exact` or `observed`
    containers: tuple[tuple[str, tuple[Grant, ...]], ...] = ()

    def devices(self) -> frozenset[int]:
        """Return the indices of all devices (exact nodes), each once."""
        return frozenset(g.dev for _, grants in self.containers for g in grants if g.dev >= 0)
