"""Every policy by its name, which is also its key in the configuration: a new policy is one line here.

Invariant: each mask has one reason word for the nodes it rejects, so that what people read is a constant; and masks
run from what never changes to what changes often, so that the last mask reached is what a request waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from policies import fit, fragmentation, mig, packing, sharing, topology, waste
from policies.columns import Ask, BoolArray, FloatArray, Kind, Mix, Snapshot

Mask: TypeAlias = Callable[[Snapshot, Ask, Mix], BoolArray]
Score: TypeAlias = Callable[[Snapshot, Ask, Mix], FloatArray]
Tier: TypeAlias = tuple[tuple[str, float], ...]

MASKS: dict[str, Mask] = {
    "in-service": fit.in_service,
    "allowed": fit.allowed,
    "mig-profile": mig.profile_there,
    "whole-gpu-kind": fit.whole_gpu_kind,
    "init-only": fit.init_only,
    "model": fit.model_fit,
    "mig-mode": mig.mode_on,
    "gpu-count": fit.gpu_count,
    "share-size": sharing.share_size,
    "host-size": fit.host_size,
    "named-devices": fit.named_devices,
    "healthy": fit.healthy,
    "slice-fit": mig.slice_fit,
    "share-memory": sharing.memory_free,
    "share-fit": sharing.share_fit,
    "devices-free": fit.devices_free,
    "cpu-memory": fit.cpu_memory,
}

REASONS: dict[str, str] = {
    "in-service": "InventoryStale",
    "allowed": "NoMatchingNode",
    "mig-profile": "NoSuchMigProfile",
    "whole-gpu-kind": "SharingNotAllowed",
    "init-only": "InvalidRequest",
    "model": "GpuModelMismatch",
    "mig-mode": "MigModeOff",
    "gpu-count": "ExceedsNodeSize",
    "share-size": "ExceedsGpuMemory",
    "host-size": "ExceedsNodeSize",
    "named-devices": "InventoryStale",
    "healthy": "GpuUnhealthy",
    "slice-fit": "MigProfileUnplaceable",
    "share-memory": "GpuMemoryShort",
    "share-fit": "GpuCoreShort",
    "devices-free": "GpusBusy",
    "cpu-memory": "WaitingForCapacity",
}
"""The per-node word for a node whose first failing mask is this one."""

_DEVICES = frozenset({Kind.WHOLE, Kind.MIG, Kind.SHARE})
_FOR: dict[str, frozenset[Kind]] = {
    "mig-profile": frozenset({Kind.MIG}),
    "whole-gpu-kind": frozenset({Kind.WHOLE, Kind.SHARE}),
    "model": _DEVICES,
    "mig-mode": frozenset({Kind.MIG}),
    "gpu-count": _DEVICES,
    "share-size": frozenset({Kind.SHARE}),
    "named-devices": _DEVICES,
    "healthy": _DEVICES,
    "slice-fit": frozenset({Kind.MIG}),
    "share-memory": frozenset({Kind.SHARE}),
    "share-fit": frozenset({Kind.SHARE}),
    "devices-free": frozenset({Kind.WHOLE, Kind.SHARE}),
}
_ANY = frozenset(Kind)


def asks_of(mask: str) -> frozenset[Kind]:
    """Return the kinds of asks that a mask may reject; it passes every node for the others and need not be asked."""
    return _FOR.get(mask, _ANY)


STATIC_MASKS = frozenset(
    {"allowed", "mig-profile", "whole-gpu-kind", "init-only", "model", "mig-mode", "gpu-count", "share-size"}
    | {"in-service", "host-size"}
)
"""Masks that read only what Node objects say, nothing that bookings change."""

SCORES: dict[str, Score] = {
    "fill-gpus": packing.fill_gpus,
    "fill-host": packing.fill_host,
    "keep-scarce": packing.keep_scarce,
    "spread": packing.spread,
    "least-loss": mig.least_loss,
    "fill-tightest": sharing.fill_tightest,
    "least-fragment": fragmentation.least_fragment,
    "least-waste": waste.least_waste,
    "one-group": topology.one_group,
}

STATIC_SCORES = frozenset({"keep-scarce"})
"""Scores that read only what Node objects say, of the whole cluster; the others look at one node alone."""

_TELLS_APART: dict[str, frozenset[Kind]] = {
    "keep-scarce": _DEVICES,
    "least-loss": frozenset({Kind.MIG}),
    "fill-tightest": frozenset({Kind.SHARE}),
    "least-fragment": frozenset({Kind.NONE, Kind.WHOLE, Kind.SHARE}),
    "one-group": frozenset({Kind.WHOLE}),
}


def told_apart_by(score: str) -> frozenset[Kind]:
    """Return the kinds of asks for which a score prefers anything; for the others all nodes are alike."""
    return _TELLS_APART.get(score, _ANY)


DEFAULT_MASKS = TURN_MASKS = tuple(MASKS)
"""What a decision on the whole cluster must pass."""

FILTER_MASKS = tuple(name for name in MASKS if name not in {"allowed", "host-size", "cpu-memory"})
"""What /filter judges: kube-scheduler has just judged place, cpu and memory itself, on a fresher view."""

DEFAULT_TIERS: tuple[Tier, ...] = (
    (("least-loss", 1.0),),
    (("least-waste", 1.0), ("one-group", 0.01)),
)
"""A link group is worth up to 0.72 GPUs of likely waste to a pod of eight, 0.24 to a pod of two."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The masks in their order and the scores in their tiers, as an operator may choose them.

    Attributes:
        masks: all of `MASKS`, each once; the order decides which mask is named as a node's first failing one.
        tiers: first tier first; (score, weight) pairs, weights count inside their tier only.
    """

    masks: tuple[str, ...] = DEFAULT_MASKS
    tiers: tuple[Tier, ...] = DEFAULT_TIERS

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: an unknown, doubled or missing name, or a weight that is not above 0; it lists legal names.
        """
        legal = f"legal names: {', '.join(MASKS)}"
        if unknown := [name for name in self.masks if name not in MASKS]:
            raise ValueError(f"policy.masks: there is no mask {unknown[0]!r}; {legal}")
        if missing := [name for name in MASKS if name not in self.masks]:
            raise ValueError(f"policy.masks: {missing[0]!r} is missing; masks keep placements safe, reorder them only")
        if len(set(self.masks)) != len(self.masks):
            raise ValueError(f"policy.masks: a mask is named twice; {legal}")
        legal = f"legal names: {', '.join(SCORES)}"
        named = [name for tier in self.tiers for name, _ in tier]
        if unknown := [name for name in named if name not in SCORES]:
            raise ValueError(f"policy.tiers: there is no score {unknown[0]!r}; {legal}")
        if len(set(named)) != len(named) or not all(self.tiers):
            raise ValueError(f"policy.tiers: a score is named twice, or a tier is empty; {legal}")
        if any(not 0 < weight < float("inf") for tier in self.tiers for _, weight in tier):
            raise ValueError("policy.tiers: a weight must be a number above 0")


def read_policies(
    masks: Sequence[str] | None = None, tiers: Sequence[Sequence[str] | Mapping[str, float]] | None = None
) -> Policies:
    """Make Policies from configuration; None stands for the default.

    Args:
        masks: all mask names in the wanted order.
        tiers: per tier either names (equal weights) or name -> weight.

    Raises:
        ValueError: see Policies.
    """
    return Policies(
        masks=DEFAULT_MASKS if masks is None else tuple(masks),
        tiers=DEFAULT_TIERS
        if tiers is None
        else tuple(
            tuple(tier.items()) if isinstance(tier, Mapping) else tuple((name, 1.0) for name in tier) for tier in tiers
        ),
    )
