"""A node agent's report to the model: which GPUs answer, in which slot, how well they are and what is close to what.

The wire format is the agent's own, `nodeagent.report`, whose decoder has checked every bound before this is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.report import BAD, DRAINING, HEALTHY, MIG_ON, PROBATION, RESETTING, SUSPECT, SWITCH, Device, Report
from policies.columns import Health
from scheduler.model.node import Seen, Sighting

NUMA_MAX = 127  # as wide as the column
_HEALTH = {
    HEALTHY: Health.HEALTHY,
    PROBATION: Health.HEALTHY,  # takes new work, says the agent: it is only watched more closely
    SUSPECT: Health.SUSPECT,
    DRAINING: Health.DRAINING,
    RESETTING: Health.RESETTING,
    BAD: Health.BAD,
}


def read_report(report: Report) -> Sighting:
    """Return what a report says of a node's GPUs; those that are lost are not among them.

    While a GPU's MIG layout is being changed nothing of it may be given away.
    """
    groups = _link_groups(report.devices)
    devices = tuple(
        Seen(
            slot=device.index,
            uuid=device.uuid,
            health=Health.RESETTING if device.reconfiguring else _HEALTH[device.health.state],
            mig_mode=device.mig_mode == MIG_ON,
            numa=device.numa if device.numa is not None and device.numa <= NUMA_MAX else -1,
            link_group=group,
        )
        for device, group in zip(report.devices, groups, strict=True)
    )
    return Sighting(tuple(sorted(devices, key=lambda one: one.slot)), report.driver or "")


def gpus_told(report: Report) -> int:
    """Return how many GPUs a report claims that its machine has, those among them that no longer answer."""
    return len(report.devices) + len(report.lost)


def _link_groups(devices: Sequence[Device]) -> list[int]:
    """Return for each device the smallest place among those that working lanes join it to; -1 where it has none.

    All that reach a switch are joined to each other.
    """
    place = {name: at for at, device in enumerate(devices) for name in (device.uuid, device.bus)}
    group = list(range(len(devices)))
    through: list[int] = []
    linked: set[int] = set()
    for at, device in enumerate(devices):
        for link in device.links:
            other = at if link.to == SWITCH else place.get(link.to)
            if not link.up or other is None:
                continue
            linked |= {at, other}
            _join(group, at, other)
            if link.to == SWITCH:
                through.append(at)
    for at in through[1:]:
        _join(group, through[0], at)
    return [_root(group, at) if at in linked else -1 for at in range(len(devices))]


def _root(group: list[int], at: int) -> int:
    while group[at] != at:
        at = group[at]
    return at


def _join(group: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(group, one), _root(group, other)))
    group[high] = low
