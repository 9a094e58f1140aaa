"""Asks written for other GPU schedulers, in Tessera's own words: HAMi's resources and KAI's annotations become shares.

Invariant: what was translated is gone from the pod, so a second reading finds nothing to do; what cannot be said
exactly is refused or rounded up, never down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scheduler import GPU, SHARE

from .demand import Needs
from .devices import GPU_MEMORY, GPU_MILLI, MEMORY_MAX_MIB
from .quantity import NANO, QuantityError, nano, rounded
from .reading import Unreadable, mapping, shown
from .resources import DEVICES_MAX, is_device

HAMI_MEMORY = "nvidia.com/gpumem"
HAMI_PERCENT = "nvidia.com/gpumem-percentage"
HAMI_CORES = "nvidia.com/gpucores"
HAMI_PRIORITY = "nvidia.com/priority"
HAMI = frozenset({HAMI_MEMORY, HAMI_PERCENT, HAMI_CORES, HAMI_PRIORITY})
KAI_FRACTION = "gpu-fraction"
KAI_MEMORY = "gpu-memory"
KAI_DEVICES = "gpu-fraction-num-devices"
KAI_CONTAINER = "gpu-fraction-container-name"
KAI = (KAI_FRACTION, KAI_MEMORY, KAI_DEVICES, KAI_CONTAINER)
_PERCENT_MAX = 100


@dataclass(frozen=True, slots=True)
class Container:
    """A container: the pod's list it stands in (`containers`, `initContainers`), its place there, and what it takes."""

    listed: str
    index: int
    raw: Mapping[str, object]
    needs: Needs


@dataclass(frozen=True, slots=True)
class Translation:
    """What to change in a pod so that it asks in Tessera's words; empty when it does already.

    Attributes:
        resources: new `resources` of containers, by list and place.
        notes: annotations to set.
        dropped: annotations to take away.
        warnings: a sentence for the user on each thing that was translated.
    """

    resources: Mapping[tuple[str, int], Mapping[str, object]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def is_foreign(containers: Sequence[Container], notes: Mapping[str, object]) -> bool:
    """Say whether a pod asks for GPUs in the words of HAMi or KAI."""
    return KAI_FRACTION in notes or KAI_MEMORY in notes or any(HAMI & one.needs.amounts.keys() for one in containers)


def translate(containers: Sequence[Container], notes: Mapping[str, str]) -> Translation:
    """Return what makes a pod ask in Tessera's words.

    A share has one size for the whole pod. Memory in MiB becomes `gpu-memory`; percent of cores, percent of memory and
    a fraction become `gpu-milli`, which gives that part of the memory too.

    Raises:
        Unreadable: it contradicts itself, or asks for more than there is.
    """
    if KAI_FRACTION in notes or KAI_MEMORY in notes:
        return _from_kai(containers, notes)
    return _from_hami(containers, notes)


def _from_hami(containers: Sequence[Container], notes: Mapping[str, str]) -> Translation:
    sizes: dict[str, tuple[int, int]] = {}
    resources: dict[tuple[str, int], Mapping[str, object]] = {}
    for one in containers:
        if not HAMI & one.needs.amounts.keys():
            continue
        size = _hami_size(one.needs)
        resources[one.listed, one.index] = _without_hami(one, shared=any(size))
        if any(size):
            sizes[one.needs.name] = size
    if len(set(sizes.values())) > 1:
        first, other = next((a, b) for a in sizes for b in sizes if sizes[a] != sizes[b])
        raise _contradiction(
            f"containers {shown(first)} and {shown(other)} ask for shares of different sizes; a pod has shares of one "
            "size: make them equal, or make two pods."
        )
    if not sizes:
        return Translation(resources)
    mib, milli = next(iter(sizes.values()))
    warning = _warning(f"HAMi's resources were read as {SHARE}", mib, milli)
    return Translation(resources, _size_notes(mib, milli, notes), (), (warning,))


def _hami_size(needs: Needs) -> tuple[int, int]:
    """Return MiB and thousandths of a share, 0 where nothing is said. Raises Unreadable."""
    mib, percent, cores = (rounded(needs.amounts.get(key, 0), NANO) for key in (HAMI_MEMORY, HAMI_PERCENT, HAMI_CORES))
    where = f"container {shown(needs.name)}"
    if mib and percent:
        raise _contradiction(f"{where} asks for {HAMI_MEMORY} and for {HAMI_PERCENT}; keep one of them.")
    for key, value in ((HAMI_PERCENT, percent), (HAMI_CORES, cores)):
        if value > _PERCENT_MAX:
            raise Unreadable(f"{where}: {key} is a percentage; ask for at most 100.", code="request.share_size")
    if mib > MEMORY_MAX_MIB:
        raise Unreadable(f"{where}: {HAMI_MEMORY} is in MiB; no GPU has so many.", code="request.share_size")
    if SHARE in needs.amounts and (mib or percent or cores):
        raise _contradiction(f"{where} asks for {SHARE} and sizes it by HAMi's resources; use {GPU_MEMORY}.")
    return mib, 10 * max(percent, cores)


def _without_hami(container: Container, *, shared: bool) -> Mapping[str, object]:
    """Return a container's resources without HAMi's; `shared`: what was asked of GPUs is asked of shares."""
    where = f"container {shown(container.needs.name)}"
    resources = dict(mapping(container.raw.get("resources"), f"resources of {where}"))
    count = rounded(container.needs.amounts.get(GPU, NANO), NANO)
    for part in ("limits", "requests"):
        amounts = mapping(resources.get(part), f"{part} of {where}")
        if HAMI.isdisjoint(amounts) and GPU not in amounts:
            continue
        kept = {name: amount for name, amount in amounts.items() if name not in HAMI}
        if shared:
            kept.pop(GPU, None)
            kept[SHARE] = str(count)
        resources[part] = kept
    return resources


def _from_kai(containers: Sequence[Container], notes: Mapping[str, str]) -> Translation:
    key = KAI_FRACTION if KAI_FRACTION in notes else KAI_MEMORY
    if KAI_FRACTION in notes and KAI_MEMORY in notes:
        raise _contradiction(f"the annotations {KAI_FRACTION} and {KAI_MEMORY} exclude each other; keep one of them.")
    for one in containers:
        for resource, amount in one.needs.amounts.items():
            if resource in HAMI or (amount and is_device(resource)):
                raise _contradiction(
                    f"the annotation {key} asks for a share and container {shown(one.needs.name)} for {resource}; "
                    "keep one of them."
                )
    mib, milli = (0, _fraction(notes[key])) if key == KAI_FRACTION else (_mib(notes[key]), 0)
    count = _device_count(notes.get(KAI_DEVICES, "1"))
    chosen = _kai_container(containers, notes.get(KAI_CONTAINER))
    resources = dict(mapping(chosen.raw.get("resources"), "resources"))
    for part in ("limits", "requests"):
        resources[part] = {**mapping(resources.get(part), part), SHARE: str(count)}
    said = f"the annotation {key} was read as {SHARE}: {count} of container {shown(chosen.needs.name)}"
    return Translation(
        {(chosen.listed, chosen.index): resources},
        _size_notes(mib, milli, notes),
        tuple(word for word in KAI if word in notes),
        (_warning(said, mib, milli),),
    )


def _kai_container(containers: Sequence[Container], wanted: str | None) -> Container:
    """Return the container that gets the share: the one named, else the first. Raises Unreadable."""
    for one in containers:
        if one.needs.name == wanted or (wanted is None and one.listed == "containers"):
            return one
    raise Unreadable(f"{KAI_CONTAINER} names no container of the pod: {shown(wanted)}.", code="request.share_size")


def _fraction(note: str) -> int:
    try:
        part = nano(note)
    except QuantityError as error:
        raise Unreadable(f"{KAI_FRACTION}: {error}", code="request.share_size") from error
    if not 0 < part <= NANO:
        message = f"{KAI_FRACTION} must be more than 0 and at most 1; it is {shown(note)}."
        raise Unreadable(message, code="request.share_size")
    return rounded(part, NANO // 1000)


def _mib(note: str) -> int:
    mib = int(note) if note.isascii() and note.isdigit() and len(note) <= len(str(MEMORY_MAX_MIB)) else 0
    if not 0 < mib <= MEMORY_MAX_MIB:
        message = f"{KAI_MEMORY} must be a whole number of MiB, more than 0; it is {shown(note)}."
        raise Unreadable(message, code="request.share_size")
    return mib


def _device_count(note: str) -> int:
    count = int(note) if note.isascii() and note.isdigit() and len(note) <= len(str(DEVICES_MAX)) else 0
    if not 1 <= count <= DEVICES_MAX:
        message = f"{KAI_DEVICES} must be a whole number between 1 and {DEVICES_MAX}; it is {shown(note)}."
        raise Unreadable(message, code="request.share_size")
    return count


def _size_notes(mib: int, milli: int, notes: Mapping[str, str]) -> dict[str, str]:
    """Return the annotations that size a share; those that are there must say the same. Raises Unreadable."""
    sized = ({GPU_MEMORY: f"{mib}Mi"} if mib else {}) | ({GPU_MILLI: str(milli)} if milli else {})
    for key, value in sized.items():
        if notes.get(key, value) != value:
            raise _contradiction(f"{key} is {shown(notes[key])}, but the pod also asks for {value}; keep one of them.")
    return sized


def _warning(said: str, mib: int, milli: int) -> str:
    size = ", ".join([f"{mib}Mi of memory"] * bool(mib) + [f"{milli} thousandths of a GPU"] * bool(milli))
    return f"{said}, each with {size}"


def _contradiction(message: str) -> Unreadable:
    return Unreadable(message, code="request.contradiction")
