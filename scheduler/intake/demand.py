"""What a pod takes from its node, by the formula of kube-scheduler: sidecars, init containers, overhead, resizes.

Sums are kept in billionths and rounded once, at the end, so that many small requests do not add up to more than
kube-scheduler counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.model.pod import AMOUNT_MAX, Amounts

from .quantity import NANO, QuantityError, nano, rounded
from .reading import NAME_MAX, Reader, Unreadable, shown
from .resources import is_device

DEVICE_MAX = 1 << 40
RESOURCES_MAX = 64
ASKING = ("initContainers", "containers", "resources", "overhead")
"""The fields of a spec that are read here."""
HELD = ("containerStatuses", "initContainerStatuses", "allocatedResources", "resources")
"""The fields of a status that are read here: what the kubelet still holds."""
_RESIZED_POD = ("cpu", "memory")
_HUGEPAGES = "hugepages-"


@dataclass(frozen=True, slots=True)
class Needs:
    """What one container takes, in billionths by resource; role is `app`, `sidecar` or `init`."""

    name: str
    role: str
    amounts: Mapping[str, int]


def read_needs(spec: Mapping[str, object], status: Mapping[str, object], reader: Reader) -> tuple[Needs, ...]:
    """Return the containers of a pod, init containers first, in declaration order."""
    states = _states(status, reader)
    early = [_container(raw, _early_role(raw), states, reader) for raw in _listed(spec, "initContainers", reader)]
    return (*early, *(_container(raw, "app", states, reader) for raw in _listed(spec, "containers", reader)))


def total(needs: Iterable[Needs]) -> dict[str, int]:
    """Return the most that runs at once, in billionths: the formula over containers alone."""
    sidecars: dict[str, int] = {}
    running: dict[str, int] = {}
    peak: dict[str, int] = {}
    for container in needs:
        for resource, amount in container.amounts.items():
            before = sidecars.get(resource, 0)
            if container.role == "sidecar":
                sidecars[resource] = before + amount
            elif container.role == "init":
                peak[resource] = max(peak.get(resource, 0), before + amount)
            else:
                running[resource] = running.get(resource, 0) + amount
    names = {**sidecars, **running, **peak}
    return {n: max(sidecars.get(n, 0) + running.get(n, 0), peak.get(n, 0)) for n in names}


def pod_total(
    spec: Mapping[str, object], status: Mapping[str, object], together: Mapping[str, int], reader: Reader
) -> dict[str, int]:
    """Return what the whole pod takes, in billionths: pod-level resources override, overhead comes on top.

    Args:
        spec: of the pod.
        status: of the pod.
        together: the `total` of its containers.
        reader: keeps the refusals.
    """
    totals = {**together, **_pod_level(spec, status, together, reader)}
    for resource, amount in _amounts(spec.get("overhead"), "spec.overhead", reader).items():
        totals[resource] = totals.get(resource, 0) + amount
    return totals


def amounts_and_tokens(totals: Mapping[str, int], reader: Reader) -> tuple[Amounts, tuple[tuple[str, int], ...]]:
    """Round totals to what the node books: cpu, memory, storage and other resources, and the device resources."""
    extended, tokens = [], []
    core = {"cpu": 0, "memory": 0, "ephemeral-storage": 0}
    for resource in sorted(totals):
        if resource in core:
            core[resource] = _capped(resource, totals[resource], NANO // 1000 if resource == "cpu" else NANO, reader)
        elif is_device(resource):
            tokens.append((resource, _capped(resource, totals[resource], NANO, reader, limit=DEVICE_MAX)))
        else:
            extended.append((resource, _capped(resource, totals[resource], NANO, reader)))
    if len(extended) + len(tokens) > RESOURCES_MAX:
        reader.refuse(
            Unreadable(
                f"the pod asks for more than {RESOURCES_MAX} different resources; ask for fewer.",
                code="request.too_many_resources",
            )
        )
    amounts = Amounts(
        cpu_milli=core["cpu"],
        memory_bytes=core["memory"],
        storage_bytes=core["ephemeral-storage"],
        extended=tuple((resource, count) for resource, count in extended[:RESOURCES_MAX] if count),
    )
    return amounts, tuple((resource, count) for resource, count in tokens[:RESOURCES_MAX] if count)


def _capped(resource: str, amount: int, unit: int, reader: Reader, *, limit: int = AMOUNT_MAX) -> int:
    count = rounded(amount, unit)
    if count > limit:
        message = f"the pod asks for too much {shown(resource)}; no node has that: ask for less."
        reader.refuse(Unreadable(message, code="request.overflow"))
    return min(count, limit)


def _listed(spec: Mapping[str, object], key: str, reader: Reader) -> list[Mapping[str, object]]:
    where = f"spec.{key}"
    return [reader.mapping(item, where + "[]") for item in reader.sequence(spec.get(key), where)]


def _states(status: Mapping[str, object], reader: Reader) -> dict[str, Mapping[str, object]]:
    """Return container statuses by container name."""
    states: dict[str, Mapping[str, object]] = {}
    for key in ("containerStatuses", "initContainerStatuses"):
        for item in reader.sequence(status.get(key), f"status.{key}"):
            if isinstance(item, dict) and isinstance(item.get("name"), str):
                states[item["name"]] = item
    return states


def _early_role(raw: Mapping[str, object]) -> str:
    return "sidecar" if raw.get("restartPolicy") == "Always" else "init"


def _container(
    raw: Mapping[str, object], role: str, states: Mapping[str, Mapping[str, object]], reader: Reader
) -> Needs:
    called = reader.name(raw.get("name"), "a container's name")
    where = f"container {shown(called)}"
    amounts = _requests(raw.get("resources"), where, reader)
    state = states.get(called)
    if state is not None and role != "init":
        _raise_to(amounts, state.get("allocatedResources"), f"allocatedResources of {where}", reader)
        current = reader.mapping(state.get("resources"), f"status resources of {where}")
        _raise_to(amounts, current.get("requests"), f"status resources of {where}", reader)
    return Needs(name=called, role=role, amounts=amounts)


def _requests(value: object, where: str, reader: Reader) -> dict[str, int]:
    """Return a container's requests; a limit without a request is a request."""
    resources = reader.mapping(value, f"resources of {where}")
    amounts = _amounts(resources.get("requests"), f"requests of {where}", reader)
    limits = _amounts(resources.get("limits"), f"limits of {where}", reader)
    for resource, limit in limits.items():
        request = amounts.setdefault(resource, limit)
        if "/" in resource and request != limit:
            message = f"{where} has another limit than request of {shown(resource)}; make them equal."
            reader.refuse(Unreadable(message, code="request.limits_differ"))
            amounts[resource] = max(request, limit)
    return amounts


def _pod_level(
    spec: Mapping[str, object], status: Mapping[str, object], containers: Mapping[str, int], reader: Reader
) -> dict[str, int]:
    """Return what spec.resources puts in place of the containers' sum: cpu, memory and huge pages only."""
    if spec.get("resources") is None:
        return {}
    resources = reader.mapping(spec["resources"], "spec.resources")
    amounts = _amounts(resources.get("requests"), "requests of spec.resources", reader)
    limits = _amounts(resources.get("limits"), "limits of spec.resources", reader)
    for resource in limits.keys() - containers.keys():
        amounts.setdefault(resource, limits[resource])
    _raise_to(amounts, status.get("allocatedResources"), "status.allocatedResources", reader, only_known=True)
    current = reader.mapping(status.get("resources"), "status.resources")
    _raise_to(amounts, current.get("requests"), "status.resources", reader, only_known=True)
    return {n: amount for n, amount in amounts.items() if n in _RESIZED_POD or n.startswith(_HUGEPAGES)}


def _raise_to(amounts: dict[str, int], value: object, where: str, reader: Reader, *, only_known: bool = False) -> None:
    """Raise amounts to what the kubelet still holds for a pod that is being resized."""
    if value is None:
        return
    for resource, amount in _amounts(value, where, reader).items():
        if resource in amounts or not only_known:
            amounts[resource] = max(amounts.get(resource, 0), amount)


def _amounts(value: object, where: str, reader: Reader) -> dict[str, int]:
    """Return a resource list in billionths; what cannot be read or is negative counts 0 and is refused."""
    if value is None:
        return {}
    listed = reader.mapping(value, where)
    return {resource: _amount(resource, listed[resource], where, reader) for resource in listed}


def _amount(resource: str, value: object, where: str, reader: Reader) -> int:
    try:
        amount = nano(value)
    except QuantityError as error:
        reader.refuse(Unreadable(f"{where}, {shown(resource)}: {error}", code="request.quantity"))
        return 0
    if amount < 0:
        message = f"{where}: {shown(resource)} is negative; ask for 0 or more."
        reader.refuse(Unreadable(message, code="request.negative"))
        return 0
    if amount % NANO and "/" in resource:
        message = f"{where}: {shown(resource)} is counted in whole pieces; ask for a whole number."
        reader.refuse(Unreadable(message, code="request.fractional"))
    if len(resource) > NAME_MAX:
        reader.refuse(Unreadable(f"{where}: the name of a resource is too long; shorten it."))
    return amount
