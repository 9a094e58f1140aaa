"""Who waits, as units in which a turn decides: requests alone, and gangs that are complete. Pure.

A gang is one unit while none of its members holds anything; it stands where its first member stands, and waits until
as many are there as it is large. Members that come when others hold something already (a replacement, or one more than
needed) are units of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from policies.ordering import RequestRank

from .turn import Amounts, Unit

Gang: TypeAlias = tuple[str, str, str]
"""Namespace, queue and the annotation's word."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request that may be decided.

    Attributes:
        id: the request's.
        queue: its queue.
        rank: its place there.
        kind: requests of one kind ask nodes and quota for the same.
        least, most: what it takes of the quota, where that is least and where it is most.
        gang: None = it stands alone.
        size: how many members its gang has at least.
    """

    id: str
    queue: str
    rank: RequestRank
    kind: Hashable
    least: Amounts
    most: Amounts
    gang: Gang | None = None
    size: int = 0


def line_up(waiting: Iterable[Waiting], held: Mapping[Gang, int]) -> tuple[list[Unit], list[str]]:
    """Return the units that may be decided, and the ids of members whose gang is not complete.

    Args:
        waiting: all that may be decided.
        held: how many members of a gang hold something already.
    """
    units: list[Unit] = []
    gangs: dict[Gang, list[Waiting]] = {}
    for one in waiting:
        if one.gang is None or held.get(one.gang):
            units.append(Unit(one.queue, one.rank, one.kind, (one.id,), one.least, one.most))
        else:
            gangs.setdefault(one.gang, []).append(one)
    incomplete: list[str] = []
    for members in gangs.values():
        size = max(one.size for one in members)
        if len(members) < size:
            incomplete += [one.id for one in members]
        else:
            units.append(_together(sorted(members, key=lambda one: one.rank)[:size]))
    return units, incomplete


def _together(members: list[Waiting]) -> Unit:
    first = members[0]
    ids, kinds = tuple(one.id for one in members), tuple(one.kind for one in members)
    least, most = _sum(one.least for one in members), _sum(one.most for one in members)
    return Unit(first.queue, first.rank, kinds, ids, least, most)


def _sum(parts: Iterable[Amounts]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for key, amount in part.items():
            total[key] = total.get(key, 0) + amount
    return total
