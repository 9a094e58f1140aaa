"""A Request in numbers: the Ask that policies read, made against the codes of the live columns.

`allowed` costs a walk over all nodes, so it is kept per distinct Selection and mended node by node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from policies.columns import Ask, BoolArray, Kind
from policies.placements import NO_OFFER, Offer, Placements
from scheduler.intake.gpu_model import matches
from scheduler.model.pod import DeviceAsk, Request, Selection

from .registry import Registry
from .selection import admits

SELECTIONS_MAX = 512


@dataclass(slots=True)
class Asks:
    """Makes Asks for one registry and keeps what is dear to compute."""

    registry: Registry
    _allowed: OrderedDict[Selection, BoolArray] = field(default_factory=OrderedDict)
    _placements: Placements = field(init=False)
    _offers: dict[tuple[str, int], Offer] = field(default_factory=dict)
    _models: dict[tuple[tuple[str, ...], int], BoolArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with every profile as likely as any other."""
        self._placements = self.registry.columns.placements

    def weigh(self, weights: Mapping[str, float]) -> None:
        """From now on place MIG instances for this mix: how often each profile name is asked."""
        self._placements = self._placements.weighed(weights)
        self._offers.clear()

    def ask(self, request: Request, *, everywhere: bool = False) -> Ask:
        """Return the numbers of a request.

        Args:
            request: what the pod wants.
            everywhere: skip `allowed` (all True); for callers to whom kube-scheduler has just named the nodes.
        """
        registry, devices = self.registry, request.devices
        columns = registry.columns
        extended = np.zeros(len(columns.resources), np.int64)
        for resource, count in request.amounts.extended:
            extended[columns.resources.find(resource)] += count  # row 0: a resource that no node has
        nodes = registry.snapshot().nodes
        return Ask(
            kind=devices.kind,
            count=devices.count,
            cpu_milli=request.amounts.cpu_milli,
            memory_bytes=request.amounts.memory_bytes,
            storage_bytes=request.amounts.storage_bytes,
            extended=extended,
            models=self.models(devices.models),
            allowed=np.ones(nodes, np.bool_) if everywhere else self.allowed(request.selection),
            init_only=devices.init_only,
            device_milli=devices.milli if devices.kind is Kind.SHARE else 1000,
            device_mib=devices.memory_mib,
            parts=_parts(devices) if devices.kind is Kind.SHARE else (),
            profile=columns.profiles.find(devices.profile) if devices.kind is Kind.MIG else -1,
            offer=self._offer(devices.profile) if devices.kind is Kind.MIG else NO_OFFER,
            priority=request.priority,
        )

    def _offer(self, profile: str) -> Offer:
        """Return where instances of a profile fit, by mig_row and by model code."""
        names = self.registry.columns.models.names
        key = (profile, len(names))
        known = self._offers.get(key)
        if known is None:
            if len(self._offers) >= SELECTIONS_MAX:
                self._offers.clear()
            known = self._offers[key] = self._placements.offer(profile, [name.partition("|")[0] for name in names])
        return known

    def nearest(self, request: Request) -> tuple[str, ...]:
        """Return up to three MIG profiles that GPUs of the cluster have, those most like the one asked first."""
        columns, wished = self.registry.columns, self.models(request.devices.models)
        names = [name for name, wanted in zip(columns.models.names, wished, strict=True) if wanted]
        profile = request.devices.profile
        return columns.placements.nearest(profile, [name.partition("|")[0] for name in names]) if profile else ()

    def models(self, wishes: tuple[str, ...]) -> BoolArray:
        """Return `[M]` which models a gpu-model annotation allows; without one all, the unknown model too."""
        names = self.registry.columns.models.names
        key = (wishes, len(names))
        known = self._models.get(key)
        if known is None:
            if len(self._models) >= SELECTIONS_MAX:
                self._models.clear()
            known = np.asarray([not wishes or _wished(wishes, name) for name in names], np.bool_)
            self._models[key] = known
        return known

    def allowed(self, selection: Selection) -> BoolArray:
        """Return `[N]` on which nodes selector, affinity, taints and cordons let this selection run."""
        nodes = self.registry.snapshot().nodes
        known = self._allowed.get(selection)
        if known is not None and known.shape[0] == nodes:
            self._allowed.move_to_end(selection)
            return known
        known = np.zeros(nodes, np.bool_)
        for name, row in self.registry.columns.rows.items():
            known[row] = admits(selection, self.registry.nodes[name])
        self._allowed[selection] = known
        if len(self._allowed) > SELECTIONS_MAX:
            self._allowed.popitem(last=False)
        return known

    def node_changed(self, name: str) -> None:
        """Mend what is kept after one node came, changed or went."""
        row, node = self.registry.columns.rows.get(name), self.registry.nodes.get(name)
        if row is None or node is None:
            return  # a hole is never schedulable, whatever `allowed` says of it
        for selection, known in self._allowed.items():
            if row < known.shape[0]:
                known[row] = admits(selection, node)


def shape(request: Request, *, everywhere: bool = False) -> tuple[object, ...]:
    """Return what tells the classes of asks apart: requests of one shape get equal Asks, but for queue and priority.

    Args:
        request: what the pod wants.
        everywhere: as for `Asks.ask`; then place, storage and extended resources are not judged and do not count.
    """
    devices, amounts = request.devices, request.amounts
    asked = (
        *(devices.kind, devices.count, devices.profile, devices.memory_mib, devices.milli, devices.models),
        *(devices.init_only, _parts(devices) if devices.kind is Kind.SHARE else ()),
        *(amounts.cpu_milli, amounts.memory_bytes),
    )
    return asked if everywhere else (*asked, amounts.storage_bytes, amounts.extended, request.selection)


def _parts(devices: DeviceAsk) -> tuple[int, ...]:
    """Return the shares of each container, which are on different devices.

    Where an ordinary init container asks too, all of the pod's are: it reuses those of the app containers, and could
    find two of them on one device.
    """
    if any(each.role == "init" for each in devices.containers):
        return (devices.count,)
    return tuple(each.count for each in devices.containers)


def _wished(wishes: tuple[str, ...], name: str) -> bool:
    """Say whether one of the wishes names this model; the unknown model is never named."""
    model, _, product = name.partition("|")
    return bool(model) and any(matches(wish, model, product) for wish in wishes)
