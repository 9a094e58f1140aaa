"""A Queue: one tenant's line, its place in the tree, and what it may use.

Keys of amounts: `gpu` (every whole GPU), a model name as in `tessera.dev/gpu-model` (whole GPUs of that model),
`mig:<profile>` (instances, with "+"), `milli` (shares, 1000 = one GPU), `cpu` (thousandths of a core), `memory` (MiB)
and `storage:<class>` (GiB). Invariant: every amount is a whole number of 0..`LIMIT_MAX`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .pod import Expression

LIMIT_MAX = 1 << 40
"""Largest amount a queue may name."""

WEIGHT_MAX = 1_000_000
DEPTH_MAX = 32
"""Most levels of a tree of queues."""

GPU_KEY, MILLI_KEY, CPU_KEY, MEMORY_KEY = "gpu", "milli", "cpu", "memory"
MIG_KEY, STORAGE_KEY = "mig:", "storage:"  # followed by the profile, by the class
DEFAULT_QUEUE = "default"


@dataclass(frozen=True, slots=True)
class Selector:
    """Which namespaces may use a queue: all conditions hold; none at all selects every namespace."""

    labels: tuple[tuple[str, str], ...] = ()
    expressions: tuple[Expression, ...] = ()  # operators In, NotIn, Exists, DoesNotExist


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue as its object or its document says.

    Attributes:
        parent: name of the queue above; empty = a root.
        weight: divides its share; a queue of weight 2 gets twice as much before it counts as equal.
        nominal: what is its own, and beside that a pool for all queues below it.
        borrow_limit: most it may use beyond its own and that of the queues below; a key that is absent: no limit.
        lend_limit: most of that which others may borrow; a key that is absent: all.
        namespaces: who may use it; None = nobody.
        autoscale: machines may be asked for on its behalf.
        stopped: it and the queues below admit nothing.
        uid, resource_version: of its object in a cluster; empty in a file.
        generation: of its object's spec.
    """

    name: str
    parent: str = ""
    weight: int = 1
    nominal: Mapping[str, int] = field(default_factory=dict)
    borrow_limit: Mapping[str, int] = field(default_factory=dict)
    lend_limit: Mapping[str, int] = field(default_factory=dict)
    namespaces: Selector | None = None
    autoscale: bool = False
    stopped: bool = False
    uid: str = ""
    resource_version: str = ""
    generation: int = 0

    def lists(self, key: str) -> bool:
        """Say whether this queue sets any limit on a key."""
        return key in self.nominal or key in self.borrow_limit or key in self.lend_limit

    def same_as(self, other: Queue) -> bool:
        """Say whether another state of this queue says the same; only its object's version may differ."""
        return replace(self, resource_version="") == replace(other, resource_version="")


BUILT_IN = Queue(DEFAULT_QUEUE, namespaces=Selector())
"""The queue `default` where nobody made one: every namespace may use it, and it has no limit."""


def is_model(key: str) -> bool:
    """Say whether a key names a GPU model."""
    return key not in {GPU_KEY, MILLI_KEY, CPU_KEY, MEMORY_KEY} and not key.startswith((MIG_KEY, STORAGE_KEY))


def written(key: str, amount: int) -> int | str:
    """Return an amount as people write it: cpu and memory as Kubernetes quantities, the rest as numbers."""
    if key == CPU_KEY:
        return f"{amount}m" if amount % 1000 else str(amount // 1000)
    if key != MEMORY_KEY:
        return amount
    for unit, size in (("Ti", 1 << 20), ("Gi", 1 << 10)):
        if amount and amount % size == 0:
            return f"{amount // size}{unit}"
    return f"{amount}Mi"
