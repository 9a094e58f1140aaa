"""Nodes, pods and what is taken: the live inventory, changed by one event at a time.

A pod takes room at most once, whoever says so: `observed` (it is bound) beats `claimed` (the ledger committed it)
beats `intended` (a /filter answer that may still come to nothing). Invariant: every column equals what the Node
objects and the reports of their agents say minus the bookings in force, also when a change raises: then everything is
as it was before. `rebuilt` makes the same columns from nothing, for tests and audits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from policies.columns import DEVICE_COLUMNS, Health, Mode, Snapshot, Use
from policies.placements import NO_PLACEMENTS, Placements
from scheduler import GPU, MIG_PREFIX, SHARE
from scheduler.intake.resources import profile_of
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.node import Device, Node, Seen, Sighting
from scheduler.model.pod import Amounts, Pod

from .snapshot import TAKEN_COLUMNS, Columns, Taken

BOOKED_MAX = 1 << 50
AUDITED = (
    *("cpu_milli_free", "memory_bytes_free", "storage_bytes_free", "pods_free", "gpus_free", "shares_free", "foreign"),
    *("health", "mig_mode", "numa", "link_group"),
    *TAKEN_COLUMNS,
)


class Source(IntEnum):
    """Who says that a pod takes room; the highest one counts."""

    INTENDED = 0
    CLAIMED = 1
    OBSERVED = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A MIG instance (profile, first memory slice, how many) or a share (thousandths, MiB) on one device."""

    slot: int
    profile: str = ""
    start: int = 0
    size: int = 0
    milli: int = 0
    mib: int = 0


@dataclass(frozen=True, slots=True)
class Booking:
    """Room taken on one node by one pod."""

    node: str
    amounts: Amounts
    tokens: tuple[tuple[str, int], ...] = ()
    devices: tuple[tuple[int, Use], ...] = ()  # slots of an exact node
    parts: tuple[Part, ...] = ()  # what is taken of those that are not taken whole
    named: bool = True  # False: it holds devices, and nobody knows which


Containers = tuple[tuple[str, tuple[Grant, ...]], ...]

_USES = {"whole": Use.WHOLE, "share": Use.SHARED, "mig": Use.MIG}


def booking(pod: Pod, node: str, allocation: Allocation | None) -> Booking:
    """Return the room a pod takes on a node when it holds this allocation (None = nobody wrote one)."""
    containers = allocation.containers if allocation is not None and allocation.node == node else ()
    devices: dict[int, Use] = {}
    for _, grants in containers:
        for grant in grants:
            if grant.dev >= 0:
                devices[grant.dev] = _both(devices.get(grant.dev, Use.FREE), _USES[grant.kind])
    return Booking(
        node=node,
        amounts=_bounded(pod.request.amounts),
        tokens=pod.tokens,
        devices=tuple(sorted(devices.items())),
        parts=_parts(pod, containers),
        named=bool(devices) or not pod.tokens,
    )


def unwritten(pod: Pod, node: str, slots: Collection[int]) -> Booking:
    """Return the room of a pod that will take these devices whole, before anybody has written so."""
    devices = tuple((slot, Use.WHOLE) for slot in slots)
    named = bool(devices) or not pod.tokens
    return Booking(node, _bounded(pod.request.amounts), pod.tokens, devices, named=named)


def _parts(pod: Pod, containers: Containers) -> tuple[Part, ...]:
    """Return instances and shares, each once: ordinary init containers run one after another and share theirs."""
    init = {each.name for each in pod.request.devices.containers if each.role == "init"}
    parts = [_part(grant) for name, grants in containers if name not in init for grant in grants if _divides(grant)]
    beyond = dict.fromkeys(
        _part(grant) for name, grants in containers if name in init for grant in grants if _divides(grant)
    )
    return (*parts, *beyond)


def _divides(grant: Grant) -> bool:
    return grant.dev >= 0 and grant.kind != "whole"


def _part(grant: Grant) -> Part:
    return Part(grant.dev, grant.profile, max(grant.start, 0), grant.size, grant.milli, grant.mib)


def _both(one: Use, other: Use) -> Use:
    """Return what a device is used for that is used for both; two different things at once count as all of it."""
    return other if one in {Use.FREE, other} else Use.WHOLE


class Registry:
    """The inventory. All methods are plain and synchronous; the event loop that calls them owns it."""

    def __init__(self, placements: Placements = NO_PLACEMENTS) -> None:
        """Start empty; `placements` knows the models that can be cut into MIG instances."""
        self.nodes: dict[str, Node] = {}  # with what their agents say
        self._bare: dict[str, Node] = {}  # as their Node objects are
        self._seen: dict[str, tuple[str, Sighting, bool]] = {}  # uid of the node, its last report, silent since then
        self.pods: dict[str, Pod] = {}
        self.columns = Columns(placements)
        self.generation = 0
        self.freed = 0  # grows when something that did not fit might fit now
        self.poison: set[tuple[str, str]] = set()  # kind and uid of what is there and could not be taken in
        self._said: dict[str, dict[Source, Booking]] = {}
        self._on_node: dict[str, dict[str, Booking]] = {}

    def snapshot(self) -> Snapshot:
        """Return the live columns; they change under the reader's eyes between two awaits."""
        return self.columns.view()

    # nodes

    def put_node(self, node: Node) -> bool:
        """Take in a new or changed node; another uid under the same name is another node. Returns whether it changed.

        A heartbeat (nothing that Tessera reads has changed) costs a comparison and leaves the generation alone.
        """
        seen = self._seen.get(node.name)
        if seen is not None and seen[0] != node.uid:
            seen = None  # of another machine
        changed = self._replace(self._joined(node, seen))
        self._bare[node.name] = node
        if seen is None:
            self._seen.pop(node.name, None)
        return changed

    def hear(self, name: str, sighting: Sighting) -> bool:
        """Take in what a node's agent reports; nothing that it leaves out is free. Returns whether that changed it.

        Raises:
            KeyError: there is no such node.
        """
        return self._tell(name, (self._bare[name].uid, sighting, False))

    def hush(self, name: str) -> bool:
        """Take note that a node's agent has been silent for too long; nothing for a node that never had one."""
        seen = self._seen.get(name)
        return seen is not None and not seen[2] and self._tell(name, (*seen[:2], True))

    def _tell(self, name: str, seen: tuple[str, Sighting, bool]) -> bool:
        if self._seen.get(name) == seen:
            return False
        changed = self._replace(self._joined(self._bare[name], seen))
        self._seen[name] = seen
        return changed

    def _replace(self, node: Node) -> bool:
        """Put a node in the place of the one of its name. Returns whether it is another; a failure changes nothing."""
        old = self.nodes.get(node.name)
        if old is not None and _same(old, node):
            self.nodes[node.name] = node
            return False
        try:
            self._make(node)
        except Exception:
            if old is not None:
                self._make(old)
            else:
                self.nodes.pop(node.name, None)
                if node.name in self.columns.rows:
                    self.columns.clear(node.name)
            raise
        self.freed += 1
        return True

    @staticmethod
    def _joined(node: Node, seen: tuple[str, Sighting, bool] | None) -> Node:
        """Return a node with what its agent said of it."""
        if seen is None:
            return node
        _, sighting, silent = seen
        by_slot = {one.slot: one for one in sighting.devices}
        exact = node.mode is Mode.EXACT
        devices = tuple(_seen(device, by_slot.get(slot), exact=exact) for slot, device in enumerate(node.devices))
        return replace(node, devices=devices, driver=sighting.driver, silent=silent)

    def _make(self, node: Node) -> None:
        """Write a node's whole row: what it offers, and what is taken of it."""
        self.nodes[node.name] = node
        row = self.columns.row(node)
        self.columns.fill(row, node)
        for held in self._on_node.get(node.name, {}).values():
            self._add(row, held, 1)
        self._retell(node.name, row, range(len(node.devices)))
        self._tell_foreign(node.name, row)
        self._touch(row)

    def remove_node(self, name: str, uid: str) -> bool:
        """Forget a node; a late delete of an older node of the same name is ignored."""
        node = self.nodes.get(name)
        if node is None or node.uid != uid:
            return False
        del self.nodes[name], self._bare[name]
        self._seen.pop(name, None)
        self._touch(self.columns.clear(name))
        return True

    # pods

    def put_pod(self, pod: Pod) -> None:
        """Take in a pod as the API server shows it, and book or free what that means."""
        if pod.node and not pod.terminal:
            self.say(pod.uid, Source.OBSERVED, booking(pod, pod.node, pod.allocation))
        else:
            self.unsay(pod.uid, Source.OBSERVED)
        self.pods[pod.uid] = pod

    def remove_pod(self, uid: str) -> Pod | None:
        """Forget a pod that is gone; a claim of the ledger stays until the ledger gives it up."""
        self.unsay(uid, Source.OBSERVED)
        return self.pods.pop(uid, None)

    # bookings

    def say(self, uid: str, source: Source, held: Booking) -> None:
        """Book: `source` says that this pod takes this room."""
        self._change(uid, source, held)

    def unsay(self, uid: str, source: Source) -> None:
        """Take back what `source` said of this pod, if it said anything."""
        if source in self._said.get(uid, {}):
            self._change(uid, source, None)

    def held(self, uid: str) -> Booking | None:
        """Return the booking in force for a pod."""
        said = self._said.get(uid)
        return said[max(said)] if said else None

    def said(self, source: Source) -> Iterator[tuple[str, Booking]]:
        """Yield what one source says, in the order in which the pods were first heard of."""
        return ((uid, said[source]) for uid, said in self._said.items() if source in said)

    def unsound(self, uid: str, node: str) -> str:
        """Return why what a pod holds on an exact node cannot be handed to it now, a reason word; empty = it can."""
        held, here = self.held(uid), self.nodes.get(node)
        if held is None or here is None or held.node != node or here.mode is not Mode.EXACT or not held.devices:
            return ""
        if here.silent:
            return "InventoryStale"
        slots = [slot for slot, _ in held.devices if slot < len(here.devices)]
        return "" if all(here.devices[slot].health is Health.HEALTHY for slot in slots) else "GpuUnhealthy"

    def holders(self, node: str) -> dict[str, Booking]:
        """Return the bookings in force on one node, by pod uid."""
        return dict(self._on_node.get(node, {}))

    def _change(self, uid: str, source: Source, new: Booking | None) -> None:
        said = self._said.setdefault(uid, {})
        before, prior = said[max(said)] if said else None, said.get(source)
        if new is None:
            del said[source]
        else:
            said[source] = new
        after = said[max(said)] if said else None
        if not said:
            del self._said[uid]
        if before == after:
            return
        try:
            for held, sign in ((before, -1), (after, 1)):
                if held is not None:
                    self._book(uid, held, sign)
        except Exception:
            self._put_back(uid, source, prior, before, after)
            raise
        if before is not None:
            self.freed += 1

    def _put_back(
        self, uid: str, source: Source, prior: Booking | None, before: Booking | None, after: Booking | None
    ) -> None:
        """Undo a change that failed half-way: `before` is in force again, and its nodes' rows are made anew.

        Args:
            uid: whose.
            source: who changed what it said.
            prior: what it had said, None = nothing.
            before: the booking that was in force.
            after: the booking that could not be put into force.
        """
        said = self._said.setdefault(uid, {})
        said.pop(source, None)
        if prior is not None:
            said[source] = prior
        if not said:
            del self._said[uid]
        for name in dict.fromkeys(held.node for held in (before, after) if held is not None):
            on_node = self._on_node.setdefault(name, {})
            on_node.pop(uid, None)
            if before is not None and before.node == name:
                on_node[uid] = before
            if not on_node:
                del self._on_node[name]
            if name in self.nodes:
                self._make(self.nodes[name])

    def _book(self, uid: str, held: Booking, sign: int) -> None:
        """Put a booking into force (1) or out of it (-1)."""
        on_node = self._on_node.setdefault(held.node, {})
        if sign > 0:
            on_node[uid] = held
        else:
            del on_node[uid]
        if not on_node:
            del self._on_node[held.node]
        row = self.columns.rows.get(held.node)
        if row is not None:
            self._add(row, held, sign)
            if held.devices:
                self._retell(held.node, row, {slot for slot, _ in held.devices})
            if not held.named:
                self._tell_foreign(held.node, row)
            self._touch(row)

    def _add(self, row: int, held: Booking, sign: int) -> None:
        """Add (1) or remove (-1) the counted part of a booking; which devices are used is told by `_retell`.

        What the node does not offer is not counted there, since its code may be given between the adding and the
        removing; when the node's offer changes, its whole row is made anew.
        """
        put, node = self.columns.column, self.nodes[held.node]
        offered = {*dict(node.amounts.extended), *dict(node.slices)} if held.amounts.extended or held.tokens else set()
        put("cpu_milli_free")[row] -= sign * held.amounts.cpu_milli
        put("memory_bytes_free")[row] -= sign * held.amounts.memory_bytes
        put("storage_bytes_free")[row] -= sign * held.amounts.storage_bytes
        put("pods_free")[row] -= sign
        for resource, count in held.amounts.extended:
            if resource in offered:
                put("extended_free")[self.columns.resources.find(resource), row] -= sign * count
        for resource, count in held.tokens:
            if resource == GPU:
                put("gpus_free")[row] -= sign * count
            elif resource == SHARE:
                put("shares_free")[row] -= sign * count
            elif resource.startswith(MIG_PREFIX):
                profile = profile_of(resource)
                if profile in offered:
                    put("slices_free")[self.columns.profiles.find(profile), row] -= sign * count

    def _retell(self, name: str, row: int, slots: Collection[int]) -> None:
        """Write which of these devices of a node are used, and how much of them."""
        node = self.nodes[name]
        taken: dict[int, Taken] = {}
        for held in self._on_node.get(name, {}).values():
            for slot, use in held.devices:
                if slot in slots:
                    before = taken.get(slot)
                    taken[slot] = Taken(use) if before is None else replace(before, use=_both(before.use, use))
            for part in held.parts:
                if part.slot in slots and part.slot < len(node.devices):
                    taken[part.slot] = self._with(taken[part.slot], part, node.devices[part.slot].model)
        self.columns.take_devices(row, node, taken, slots)

    def _tell_foreign(self, name: str, row: int) -> None:
        """Write whether what an exact node has is unsure: its agent is silent, or nobody has named what is held."""
        node = self.nodes[name]
        unsure = node.silent or any(not held.named for held in self._on_node.get(name, {}).values())
        self.columns.column("foreign")[row] = unsure and node.mode is Mode.EXACT

    def _with(self, taken: Taken, part: Part, model: str) -> Taken:
        """Return what is taken of a device with one part more; of an instance not in the geometry, every engine."""
        if not part.size:
            return replace(taken, mib=taken.mib + part.mib, milli=taken.milli + part.milli)
        shape, every = self.columns.placements.shape(model, part.profile), self.columns.placements.engines(model)
        used = taken.engines or (0,) * len(every)
        more = shape.engines if shape is not None and shape.size == part.size else every
        return replace(
            taken,
            occupancy=taken.occupancy | ((1 << part.size) - 1) << part.start,
            engines=tuple(one + other for one, other in zip(used, more, strict=True)),
        )

    def _touch(self, row: int) -> None:
        self.generation += 1
        self.columns.column("generation")[row] = self.generation

    def rebuilt(self, name: str) -> Registry:
        """Return a registry of this node alone, made anew from its bookings: its columns must equal those here."""
        fresh = Registry(self.columns.placements)
        fresh.put_node(self.nodes[name])
        for uid, held in self._on_node.get(name, {}).items():
            fresh.say(uid, Source.OBSERVED, held)
        return fresh

    def differences(self, name: str) -> list[str]:
        """Return the columns in which a node's row differs from a rebuild; none, unless a booking went wrong."""
        twin, slots = self.rebuilt(name), len(self.nodes[name].devices)

        def told(registry: Registry, column: str) -> object:
            values = getattr(registry.snapshot(), column)[..., registry.columns.rows[name]]
            if column == "slices_free":
                values = values[[registry.columns.profiles.find(profile) for profile, _ in self.nodes[name].slices]]
            return values[:slots].tolist() if column in DEVICE_COLUMNS else values.tolist()

        return [column for column in (*AUDITED, "slices_free") if told(self, column) != told(twin, column)]


def _seen(device: Device, seen: Seen | None, *, exact: bool) -> Device:
    """Return a device as a report shows it. On observed nodes NVIDIA's plugin counts what is in MIG mode."""
    if seen is None:
        return replace(device, health=Health.BAD)
    told = {"uuid": seen.uuid, "health": seen.health, "numa": seen.numa, "link_group": seen.link_group}
    return replace(device, **told, mig_mode=seen.mig_mode if exact else device.mig_mode)  # type: ignore[arg-type]


def _bounded(amounts: Amounts) -> Amounts:
    """Return amounts that a thousand pods may ask of one node without leaving int64; more than this fits nowhere."""
    others = (count for _, count in amounts.extended)
    if max(amounts.cpu_milli, amounts.memory_bytes, amounts.storage_bytes, *others) <= BOOKED_MAX:
        return amounts
    return replace(
        amounts,
        cpu_milli=min(amounts.cpu_milli, BOOKED_MAX),
        memory_bytes=min(amounts.memory_bytes, BOOKED_MAX),
        storage_bytes=min(amounts.storage_bytes, BOOKED_MAX),
        extended=tuple((resource, min(count, BOOKED_MAX)) for resource, count in amounts.extended),
    )


COMPARED = Node.__dataclass_fields__.keys() - {"resource_version", "ready"}


def _same(old: Node, new: Node) -> bool:
    """Say whether two readings of a node differ in nothing but their resourceVersion and readiness, which is shown."""
    return old == new or all(getattr(old, field) == getattr(new, field) for field in COMPARED)
