"""What each queue may still take: a tree of limits, and a few short functions on it. Pure; it follows Kueue's cohorts.

A queue's *total* is its own nominal plus what the queues below it lend. Of its total it *keeps* what its lendLimit does
not offer (nothing where it has none) and lends the rest to its parent's total. It may use what it keeps, then what its
parent has free, and of that no more than its borrowLimit beyond its total. A parent's nominal is a pool of its own for
all below it: it adds to theirs and is no cap on their sum; for such a cap, give the parent the amount and the children
none (or the children their parts and the parent none). A root has nobody to borrow from. Pods may also be put into a
queue that has queues below it.

A key is limited for a queue when the queue or one above it lists the key in nominal, borrowLimit or lendLimit; where
nominal does not list it, its nominal is 0. A key that is not limited for a queue is never refused there and stands
against no quota, not even that of a parent. *Borrowing* is judged at the nearest queue that lists the key, the queue
itself first: a queue that lists nothing and lives on its parent's pool borrows only when that pool's total is spent.

Invariants: amounts are whole numbers; usage is never negative; a charge that `lacking` passed keeps every queue within
total + borrowLimit, and what is kept for a queue is never taken by another. Where limits were lowered beneath the
usage, nothing of that key passes until it has fallen, except what a queue keeps for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from scheduler.model.queue import DEPTH_MAX, GPU_KEY, Queue, is_model


@dataclass(frozen=True)
class Quota:
    """The tree: queues by name, whose parents are all in it and lead to a root (`intake.queue.sound` sees to that).

    Attributes:
        queues: by name.
        total: (queue, key) -> what it and the queues below bring in, less what those keep; keys some of them lists.
        kept: (queue, key) -> part of the total that is not lent.
    """

    queues: Mapping[str, Queue]
    total: Mapping[tuple[str, str], int]
    kept: Mapping[tuple[str, str], int]

    def path(self, queue: str) -> tuple[str, ...]:
        """Return the queue and those above it up to the root; of an unknown one its name alone."""
        return self._paths.get(queue, (queue,))

    def lister(self, queue: str, key: str) -> str:
        """Return the nearest queue on the path that lists a key; empty = the key is not limited there."""
        return self._listers.get((queue, key), "")

    def levels(self, queue: str, key: str) -> tuple[tuple[tuple[str, str], int, int, int | None], ...]:
        """Return (name and key, total, kept, borrowLimit) of the queue and those above it, the root first."""
        found = self._levels.get((queue, key))
        if found is None:
            found = self._levels[queue, key] = tuple(
                (
                    (name, key),
                    self.total.get((name, key), 0),
                    self.kept.get((name, key), 0),
                    self.queues[name].borrow_limit.get(key),
                )
                for name in reversed(self.path(queue))
            )
        return found

    def keys(self, queue: str) -> tuple[str, ...]:
        """Return the keys that are limited for a queue, sorted."""
        return self._keys.get(queue, ())

    def stopped(self, queue: str) -> bool:
        """Say whether the queue or one above it is stopped."""
        return any(self.queues[name].stopped for name in self.path(queue) if name in self.queues)

    @cached_property
    def model_keys(self) -> tuple[str, ...]:
        """The model names that any queue lists, sorted."""
        return tuple(sorted({key for _, key in self.total if is_model(key)}))

    @cached_property
    def _paths(self) -> dict[str, tuple[str, ...]]:
        paths: dict[str, tuple[str, ...]] = {}
        for name in self.queues:
            path = [name]
            while parent := self.queues[path[-1]].parent:
                path.append(parent)
                assert len(path) <= DEPTH_MAX, f"queue {name} lies too deep or in a circle"
            paths[name] = tuple(path)
        return paths

    @cached_property
    def _levels(self) -> dict[tuple[str, str], tuple[tuple[tuple[str, str], int, int, int | None], ...]]:
        return {}

    @cached_property
    def _listers(self) -> dict[tuple[str, str], str]:
        return {
            (name, key): next(above for above in self._paths[name] if self.queues[above].lists(key))
            for name in self.queues
            for key in self.keys(name)
        }

    @cached_property
    def _keys(self) -> dict[str, tuple[str, ...]]:
        own = {
            name: queue.nominal.keys() | queue.borrow_limit.keys() | queue.lend_limit.keys()
            for name, queue in self.queues.items()
        }
        return {name: tuple(sorted({k for above in path for k in own[above]})) for name, path in self._paths.items()}


def grow(queues: Iterable[Queue]) -> Quota:
    """Return the tree of these queues.

    Raises:
        KeyError: a parent is not among them.
        AssertionError: a circle, or more than `DEPTH_MAX` levels.
    """
    by_name = {queue.name: queue for queue in sorted(queues, key=lambda queue: queue.name)}
    tree = Quota(by_name, {}, {})
    pools: dict[str, dict[str, int]] = {name: {} for name in by_name}
    total: dict[tuple[str, str], int] = {}
    kept: dict[tuple[str, str], int] = {}
    for name in sorted(by_name, key=lambda name: -len(tree.path(name))):  # children first
        queue, pool = by_name[name], pools[name]
        for key in sorted(pool.keys() | queue.nominal.keys() | queue.borrow_limit.keys() | queue.lend_limit.keys()):
            whole = total[name, key] = pool.get(key, 0) + queue.nominal.get(key, 0)
            lent = min(whole, queue.lend_limit.get(key, whole)) if queue.parent else 0
            kept[name, key] = whole - lent
            if queue.parent:
                above = pools[queue.parent]
                above[key] = above.get(key, 0) + lent
    return replace(tree, total=total, kept=kept)


@dataclass(slots=True)
class Usage:
    """What is taken, by (queue, key); zeros are left out. Change it through `charge` and `refund` alone.

    Attributes:
        held: what the queue and all below it hold: what people see. Every key that was charged.
        counted: what stands against the queue's total: its own, and of those below what they do not keep. Limited keys.
    """

    held: dict[tuple[str, str], int] = field(default_factory=dict)
    counted: dict[tuple[str, str], int] = field(default_factory=dict)

    def by_queue(self) -> dict[str, dict[str, int]]:
        """Return what is held, by queue and then by key."""
        found: dict[str, dict[str, int]] = {}
        for (queue, key), amount in self.held.items():
            found.setdefault(queue, {})[key] = amount
        return found

    def copy(self) -> Usage:
        """Return one that can be changed without changing this one."""
        return Usage(dict(self.held), dict(self.counted))


def available(quota: Quota, usage: Usage, queue: str, key: str) -> int | None:
    """Return how much more of a key this queue may take now, 0 or more; None = the key is not limited there."""
    return _reach(quota, usage.counted, queue, key)


def potential(quota: Quota, queue: str, key: str) -> int | None:
    """Return the most this queue could ever take of a key, were nothing in use; None = not limited."""
    return _reach(quota, {}, queue, key)


def _reach(quota: Quota, counted: Mapping[tuple[str, str], int], queue: str, key: str) -> int | None:
    """Go from the root down: at each level what is kept and unused, and what may be had from above."""
    if not quota.lister(queue, key):
        return None
    free = 0
    for pair, total, kept, limit in quota.levels(queue, key):
        used = counted.get(pair, 0)
        if limit is not None:
            free = min(free, total + limit - max(used, kept))
        free = max(free, 0) + max(kept - used, 0)
    return free


def lacking(quota: Quota, usage: Usage, queue: str, amounts: Mapping[str, int]) -> dict[str, int]:
    """Return the keys that block, each with how much of it is missing; empty = the amounts fit. Sorted by key."""
    short: dict[str, int] = {}
    for key in sorted(amounts):
        free = available(quota, usage, queue, key) if amounts[key] else None
        if free is not None and amounts[key] > free:
            short[key] = amounts[key] - free
    return short


def exceeding(quota: Quota, queue: str, amounts: Mapping[str, int]) -> dict[str, int]:
    """Return the keys of which these amounts could never be had, each with how much is too much. Sorted by key."""
    return lacking(quota, Usage(), queue, amounts)


def charge(quota: Quota, usage: Usage, queue: str, amounts: Mapping[str, int]) -> None:
    """Take amounts for a queue. Whoever wants limits kept asks `lacking` first: what is bound is booked regardless."""
    for key, amount in amounts.items():
        assert amount >= 0, f"queue {queue}: a charge of {amount} {key}"
        for name in quota.path(queue):
            _add(usage.held, (name, key), amount)
        if not quota.lister(queue, key):
            continue
        for pair, _, kept, _ in reversed(quota.levels(queue, key)):
            inside = max(kept - usage.counted.get(pair, 0), 0)
            _add(usage.counted, pair, amount)
            amount = max(amount - inside, 0)  # noqa: PLW2901 - what the parent sees of it


def refund(quota: Quota, usage: Usage, queue: str, amounts: Mapping[str, int]) -> None:
    """Give back what `charge` took, of the same tree. Raises AssertionError where more is given back than was taken."""
    for key, amount in amounts.items():
        assert amount >= 0, f"queue {queue}: a refund of {amount} {key}"
        for name in quota.path(queue):
            _add(usage.held, (name, key), -amount)
        if not quota.lister(queue, key):
            continue
        for pair, _, kept, _ in reversed(quota.levels(queue, key)):
            outside = max(usage.counted.get(pair, 0) - kept, 0)
            _add(usage.counted, pair, -amount)
            amount = min(amount, outside)  # noqa: PLW2901 - what the parent saw of it


def _add(sums: dict[tuple[str, str], int], pair: tuple[str, str], amount: int) -> None:
    after = sums.get(pair, 0) + amount
    assert after >= 0, f"queue {pair[0]}: {pair[1]} would fall to {after}"
    if after:
        sums[pair] = after
    else:
        sums.pop(pair, None)


def would_borrow(quota: Quota, usage: Usage, queue: str, amounts: Mapping[str, int]) -> bool:
    """Say whether taking these amounts would use of any key more than the nearest queue that lists it has in total."""
    for key, amount in amounts.items():
        at = quota.lister(queue, key) if amount else ""
        if at and usage.counted.get((at, key), 0) + amount > quota.total.get((at, key), 0):
            return True
    return False


def borrowed(quota: Quota, usage: Usage, queue: str) -> dict[str, int]:
    """Return what a queue uses beyond its total, by the keys that it lists itself; zeros are left out."""
    beyond = {
        key: usage.counted.get((queue, key), 0) - quota.total.get((queue, key), 0)
        for key in quota.keys(queue)
        if quota.lister(queue, key) == queue
    }
    return {key: amount for key, amount in beyond.items() if amount > 0}


def lent(quota: Quota, usage: Usage, queue: str) -> dict[str, int]:
    """Return what of a queue's own total others hold, so that it cannot take it now; zeros are left out.

    Several queues that lend may lack the same amount: each says what is missing to itself.
    """
    free = {key: available(quota, usage, queue, key) or 0 for key in quota.keys(queue)}
    own = {key: quota.total.get((queue, key), 0) - usage.counted.get((queue, key), 0) for key in free}
    return {key: own[key] - free[key] for key in free if own[key] > free[key]}


def entitled(quota: Quota, queue: str, capacity: Mapping[str, int]) -> dict[str, int]:
    """Return by key what a queue's use is measured against when queues compete.

    It is the total of the nearest queue that lists the key; of `gpu`, where only models are listed, the sum of these;
    of a key that is not limited there, what the cluster has.

    Args:
        quota: the tree.
        queue: whose.
        capacity: what the cluster has, by key; keys that are absent do not count.
    """
    limited = {key: quota.total.get((quota.lister(queue, key), key), 0) for key in quota.keys(queue)}
    models = [amount for key, amount in limited.items() if is_model(key)]
    if models:
        limited.setdefault(GPU_KEY, sum(models))
    return {**capacity, **limited}
