"""What a pod asks of GPUs: whole ones, MIG slices or shares, and of which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from policies.columns import Kind
from scheduler import GPU, PREFIX, SHARE
from scheduler.model.pod import ContainerAsk, DeviceAsk

from .demand import DEVICE_MAX, Needs
from .quantity import NANO, QuantityError, rounded, whole
from .reading import NAME_MAX, Reader, Unreadable, shown
from .resources import is_device, profile_of

GPU_MEMORY = PREFIX + "gpu-memory"
GPU_MILLI = PREFIX + "gpu-milli"
GPU_MODEL = PREFIX + "gpu-model"
SIZING = (GPU_MEMORY, GPU_MILLI, GPU_MODEL)
"""The annotations that are read here."""
MODELS_MAX = 64
PARTS_MAX = 56  # MIG slices or shares of one pod, eight GPUs cut into seven: more could not be written down
MEMORY_MAX_MIB = 2**31 - 1  # a column of devices holds no more
_MIB = 1 << 20


def read_devices(
    needs: Sequence[Needs], together: Mapping[str, int], notes: Mapping[str, str], reader: Reader
) -> DeviceAsk:
    """Return the device ask of a pod; contradictions are refused and read as no ask.

    Args:
        needs: containers, init containers first.
        together: their total, in billionths.
        notes: the pod's annotations.
        reader: keeps the refusals.
    """
    none: tuple[str, ...] = ()
    models = reader.take(_models, notes.get(GPU_MODEL), none)
    memory_mib = reader.take(_memory_mib, notes.get(GPU_MEMORY), 0)
    milli = reader.take(_milli, notes.get(GPU_MILLI), 0)
    asked = sorted(resource for resource, amount in together.items() if amount and is_device(resource))
    try:
        ask = _ask(asked, needs, together)
    except Unreadable as error:
        reader.refuse(error)
        ask = DeviceAsk()
    sized = GPU_MEMORY in notes or GPU_MILLI in notes
    if sized and SHARE not in asked:
        message = f"{GPU_MEMORY} and {GPU_MILLI} size a share; ask for {SHARE} too, or take them away."
        reader.refuse(Unreadable(message, code="request.size_without_share"))
    if ask.kind is Kind.SHARE and not sized:
        message = f"{SHARE} needs a size; add the annotation {GPU_MEMORY} or {GPU_MILLI}."
        reader.refuse(Unreadable(message, code="request.share_without_size"))
    if ask.kind is Kind.NONE:
        return ask
    return DeviceAsk(
        kind=ask.kind,
        count=ask.count,
        resource=ask.resource,
        profile=ask.profile,
        memory_mib=memory_mib if ask.kind is Kind.SHARE else 0,
        milli=milli if ask.kind is Kind.SHARE else 0,
        models=models,
        containers=ask.containers,
        init_only=ask.init_only,
    )


def _ask(asked: Sequence[str], needs: Sequence[Needs], together: Mapping[str, int]) -> DeviceAsk:
    """Return kind, counts and profile, without sizes and models. Raises Unreadable."""
    if not asked:
        return DeviceAsk()
    if len(asked) > 1:
        raise Unreadable(
            f"the pod asks for {shown(asked[0])} and {shown(asked[1])}; ask for one kind of device in one pod.",
            code="request.mixed_devices",
        )
    resource = asked[0]
    kind, profile = _kind(resource)
    count = min(rounded(together[resource], NANO), DEVICE_MAX)
    if kind is not Kind.WHOLE and count > PARTS_MAX:
        raise Unreadable(
            f"the pod asks for more than {PARTS_MAX} of {shown(resource)}; ask for larger ones or for whole GPUs.",
            code="request.too_many_parts",
        )
    containers = tuple(
        ContainerAsk(need.name, need.role, min(own, DEVICE_MAX))
        for need in needs
        if (own := rounded(need.amounts.get(resource, 0), NANO))
    )
    return DeviceAsk(
        kind=kind,
        count=count,
        resource=resource,
        profile=profile,
        containers=containers,
        init_only=all(ask.role == "init" for ask in containers),
    )


def _kind(resource: str) -> tuple[Kind, str]:
    if resource == GPU:
        return Kind.WHOLE, ""
    if resource == SHARE:
        return Kind.SHARE, ""
    profile = profile_of(resource)
    if not profile:
        raise Unreadable(
            f"{shown(resource)} names no MIG profile; write one such as nvidia.com/mig-1g.10gb.",
            code="request.profile",
            reason="NoSuchMigProfile",
        )
    return Kind.MIG, profile


def _models(note: str | None) -> tuple[str, ...]:
    if note is None:
        return ()
    entries = tuple(entry.strip().lower() for entry in note.split(",")) if len(note) <= NAME_MAX * MODELS_MAX else ()
    if not all(entries) or not 0 < len(entries) <= MODELS_MAX or max(map(len, entries)) > NAME_MAX:
        raise Unreadable(
            f"{GPU_MODEL} must be a list such as H100,A100-80: 1 to {MODELS_MAX} models, none of them empty.",
            code="request.model",
        )
    return entries


def _memory_mib(note: str | None) -> int:
    if note is None:
        return 0
    try:
        mib = rounded(whole(note), _MIB)
    except QuantityError as error:
        raise Unreadable(f"{GPU_MEMORY}: {error}", code="request.share_size") from error
    if not 0 < mib <= MEMORY_MAX_MIB:
        raise Unreadable(
            f"{GPU_MEMORY} must be more than 0 and less than 2Pi, such as 10Gi.", code="request.share_size"
        )
    return mib


def _milli(note: str | None) -> int:
    if note is None:
        return 0
    if not (note.isascii() and note.isdigit() and len(note) <= len("1000") and 1 <= int(note) <= 1000):  # noqa: PLR2004 - thousandths of a device
        raise Unreadable(
            f"{GPU_MILLI} must be a whole number between 1 and 1000; it is {shown(note)}.", code="request.share_size"
        )
    return int(note)
