"""Where a queue stands, as people read it: what it uses, may use and borrows, and who waits. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.ordering import RequestRank, request_rank
from scheduler.model.queue import CPU_KEY, GPU_KEY, MEMORY_KEY, Queue, written
from scheduler.model.reservation import Row

from .queues import WAITING, Queues
from .quota import Usage, available, borrowed, lent, potential

SHOWN_MAX = 256  # characters of a column
_LAST = {CPU_KEY: 1, MEMORY_KEY: 2}


@dataclass(frozen=True, slots=True)
class Standing:
    """One queue at one moment; amounts by key, in the units of `model.queue`.

    Attributes:
        used: what it and the queues below hold: every key that is limited there, and every other that is not 0.
        borrowed: what stands against it beyond its total.
        lent: what of its total others hold, so that it cannot take it now.
        available: what it may still take now, of the keys that are limited there; 0 of each while it admits nothing.
        potential: the most it could ever take, were nothing in use.
        pending: how many requests wait in it and in the queues below.
        sentence: why it admits nothing, where its object must be corrected.
    """

    queue: Queue
    used: Mapping[str, int]
    borrowed: Mapping[str, int]
    lent: Mapping[str, int]
    available: Mapping[str, int]
    potential: Mapping[str, int]
    pending: int
    stopped: bool
    sentence: str = ""

    def shown_used(self) -> str:
        """Return the column USED/QUOTA: by listed key what is used of the nominal, GPUs first."""
        listed = [
            f"{key} {written(key, self.used.get(key, 0))}/{written(key, own)}" for key, own in _sorted(self.nominal)
        ]
        return ", ".join(listed)[:SHOWN_MAX]

    def shown_borrowed(self) -> str:
        """Return the column BORROWED."""
        return ", ".join(f"{key} {written(key, amount)}" for key, amount in _sorted(self.borrowed))[:SHOWN_MAX]

    @property
    def nominal(self) -> Mapping[str, int]:
        """What is the queue's own."""
        return self.queue.nominal

    def view(self) -> dict[str, Any]:
        """Return it as the API answers; amounts as the documents write them."""
        queue = self.queue
        return {
            "name": queue.name,
            "parent": queue.parent or None,
            "weight": queue.weight,
            "nominal": plain(queue.nominal),
            "borrowLimit": plain(queue.borrow_limit),
            "lendLimit": plain(queue.lend_limit),
            "autoscale": queue.autoscale,
            "stopped": self.stopped,
            "used": plain(self.used),
            "borrowed": plain(self.borrowed),
            "lent": plain(self.lent),
            "available": plain(self.available),
            "potential": plain(self.potential),
            "pending": self.pending,
            "ready": not self.sentence,
            "text": self.sentence,
            "shown": {"used": self.shown_used(), "borrowed": self.shown_borrowed()},
        }


def plain(amounts: Mapping[str, int]) -> dict[str, int | str]:
    """Return amounts as documents write them, GPUs first."""
    return {key: written(key, amount) for key, amount in _sorted(amounts)}


def _sorted(amounts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(amounts.items(), key=lambda pair: (_LAST.get(pair[0], 0), pair[0] != GPU_KEY, pair[0]))


def standings(queues: Queues, usage: Usage, pending: Mapping[str, int]) -> Callable[[str], Standing]:
    """Return what says of a queue of the tree where it stands."""
    held = usage.by_queue()
    return lambda name: _standing(queues, usage, held.get(name, {}), pending, name)


def _standing(queues: Queues, usage: Usage, held: Mapping[str, int], pending: Mapping[str, int], name: str) -> Standing:
    quota = queues.quota
    limited = quota.keys(name)
    closed, sentence = quota.stopped(name), queues.wrong.get(name, "")
    free = {key: 0 if closed or sentence else available(quota, usage, name, key) for key in limited}
    most = {key: potential(quota, name, key) for key in limited}
    return Standing(
        queue=quota.queues[name],
        used={**dict.fromkeys(limited, 0), **held},
        borrowed=borrowed(quota, usage, name),
        lent=lent(quota, usage, name),
        available={key: amount for key, amount in free.items() if amount is not None},
        potential={key: amount for key, amount in most.items() if amount is not None},
        pending=pending.get(name, 0),
        stopped=closed,
        sentence=sentence,
    )


def line_of(rows: Iterable[Row], queue: str) -> list[Row]:
    """Return the requests that wait in this very queue, the next one first."""
    return sorted((row for row in rows if row.queue == queue and row.state in WAITING), key=_rank)


def _rank(row: Row) -> RequestRank:
    return request_rank(priority=row.priority, arrival_us=row.arrival_us, namespace=row.namespace, name=row.name)
