"""The GPUs of one exact node by brute force: what each holds, what it could still take, and what cannot be true.

Invariant: a device is whole, shared or divided, never two of these; a divided one is in MIG mode and no other is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.geometry import MIG, Card, Shape, card

Json = dict[str, Any]

GPU = "nvidia.com/gpu"
SHARE = "tessera.dev/share"
MIG_DEVICES = "tessera.dev/mig-devices"
MILLI = 1000


@dataclass(frozen=True, slots=True)
class Ask:
    """What a pod asks of devices.

    Attributes:
        resource: of its tokens; empty for a pod that asks for none.
        count: devices, slices or shares of the whole pod.
        milli, mib: what the annotations say of one share; 0 = nothing.
        parts: shares of each container; those of one are on different devices. Empty: all of them are.
        flaw: why nobody can grant it as it is written.
    """

    resource: str = ""
    count: int = 0
    milli: int = 0
    mib: int = 0
    parts: tuple[int, ...] = ()
    flaw: str = ""

    @property
    def kind(self) -> str:
        """`whole`, `mig`, `share`, or empty."""
        if self.resource.startswith(MIG):
            return "mig"
        return {GPU: "whole", SHARE: "share"}.get(self.resource, "")

    def share_of(self, device_mib: int) -> tuple[int, int] | None:
        """Return milli and MiB that one share takes of a device of this size; None when no device can say.

        A memory share of a device of unknown size (0) cannot be told.
        """
        if self.mib and not self.milli:
            return (max(1, MILLI * self.mib // device_mib), self.mib) if device_mib else None
        if self.milli and not self.mib:
            return self.milli, max(1, self.milli * device_mib // MILLI)
        return self.milli, self.mib


@dataclass(slots=True)
class Device:
    """One GPU and what pods hold of it.

    Attributes:
        kinds: grants on it by kind.
        slices: (start, size) of its instances.
        shapes: instances by shape.
        engines: media engines taken.
        milli, mib: what shares take.
    """

    card: Card | None
    mig: bool
    size_mib: int
    kinds: Counter[str] = field(default_factory=Counter)
    slices: list[tuple[int, int]] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    milli: int = 0
    mib: int = 0

    def take(self, grant: Json) -> None:
        """Book one grant of an allocation, whether it can be or not."""
        self.kinds[str(grant.get("kind"))] += 1
        self.milli += grant.get("milli", 0)
        self.mib += grant.get("mib", 0)
        if grant.get("kind") == "mig":
            self.slices.append((grant.get("start", 0), grant.get("size", 0)))
            shape = self._shape(str(grant.get("profile")))
            if shape:
                self.shapes[shape.name] += 1
                self.engines.update(shape.media)

    def _shape(self, profile: str) -> Shape | None:
        return self.card.profiles.get(profile) if self.card else None

    def room(self, ask: Ask) -> int:
        """Return how many of what a pod asks this device could still take."""
        if ask.kind == "mig":
            shape = self._shape(self.card.profile_of(ask.resource)) if self.card else None
            return self._slice_room(shape) if shape and self.mig and not self.kinds.keys() - {"mig"} else 0
        if self.mig or self.kinds.keys() - ({"share"} if ask.kind == "share" else set()):
            return 0
        if ask.kind == "whole":
            return 1
        size = ask.share_of(self.size_mib)
        if size is None or not all(size):
            return 0
        often = (MILLI - self.milli) // size[0]
        if self.size_mib:
            often = min(often, (self.size_mib - self.mib) // size[1])
        return max(0, min(often, len(ask.parts) or 1))

    def _slice_room(self, shape: Shape) -> int:
        """Return how many instances of one shape fit; of one size, so the leftmost free start is never wrong."""
        assert self.card is not None
        left = [shape.most - self.shapes[shape.name]]
        left += [(self.card.engines[name] - self.engines[name]) // count for name, count in shape.media.items()]
        taken = list(self.slices)
        for start in sorted(shape.starts):
            if all(start + shape.size <= begin or begin + size <= start for begin, size in taken):
                taken.append((start, shape.size))
        return max(0, min(*left, len(taken) - len(self.slices)))

    def faults(self) -> Iterator[str]:
        """Yield why what is held here cannot be true, but for slices (see `slice_faults`)."""
        if len(self.kinds) > 1:
            yield "in two uses at once"
        if self.kinds["whole"] > 1:
            yield "held twice"
        if self.milli > MILLI or 0 < self.size_mib < self.mib:
            yield f"shared out beyond its size ({self.milli} milli, {self.mib} of {self.size_mib} MiB)"
        if self.kinds and self.mig != (set(self.kinds) == {"mig"}):
            yield "in MIG mode and not held by slices, or the other way round"
        if self.card:
            most = {shape.name: shape.most for shape in self.card.profiles.values()}
            over = [name for name, count in self.shapes.items() if count > most[name]]
            over += [name for name, count in self.engines.items() if count > self.card.engines[name]]
            if over:
                yield f"with more {', '.join(over)} than a card has"


def slice_faults(device_card: Card | None, grant: Json) -> str:
    """Return why one slice is nowhere legal: profile, size or start; empty when it is."""
    shape = device_card.profiles.get(str(grant.get("profile"))) if device_card else None
    if shape is None:
        return f"no profile {grant.get('profile')} on this model"
    if grant.get("size") != shape.size:
        return f"{grant.get('profile')} of size {grant.get('size')}, not {shape.size}"
    return (
        "" if grant.get("start") in shape.starts else f"{grant.get('profile')} must not start at {grant.get('start')}"
    )


def devices_of(labels: Mapping[str, str], tokens: int) -> list[Device]:
    """Return the empty devices of an exact node.

    Args:
        labels: of the node.
        tokens: `nvidia.com/gpu` that it advertises, which counts its devices where no label does.
    """
    count = int(labels.get(GPU + ".count", tokens))
    known = card(labels.get(GPU + ".product", ""))
    mib = int(labels.get(GPU + ".memory", "0"))
    divided = mig_devices(labels.get(MIG_DEVICES, "none"), count)
    return [Device(known, dev in divided, mib) for dev in range(count)]


def mig_devices(written: str, count: int) -> set[int]:
    """Return the devices that a label such as `none`, `all` or `0_2-3` (`,` and `.` too) puts into MIG mode."""
    if written in {"all", "none"}:
        return set(range(count)) if written == "all" else set()
    ends = [span.split("-") for span in re.split(r"[,._]", written)]
    return {dev for span in ends for dev in range(int(span[0]), int(span[-1]) + 1)}


def fits(devices: Iterable[Device], ask: Ask) -> bool:
    """Say whether some legal placement grants the whole ask on these devices as they are.

    Slices of one pod may lie on one device; whole devices are different ones, and so are the shares of one container.
    Two containers may have shares of one device.
    """
    rooms = [device.room(ask) for device in devices]
    if ask.kind != "share":
        return sum(rooms) >= ask.count
    for count in ask.parts or (ask.count,):
        rooms.sort(reverse=True)  # where most is left is never wrong
        if sum(room > 0 for room in rooms) < count:
            return False
        rooms[:count] = [room - 1 for room in rooms[:count]]
    return True
