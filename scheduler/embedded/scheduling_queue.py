"""kube-scheduler's queue: active, backing off, refused; who is tried next and what wakes whom.

Plain and synchronous: the time is passed in. A pod is in one state at a time; the heaps may hold tickets of a state it
has left, which are skipped.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from scheduler.kube.port import Object
from scheduler.model.pod import Pod

BACKOFF_S, BACKOFF_MOST_S = 1.0, 10.0
_DOUBLINGS_MOST = 10  # beyond the longest back-off anyway; a pod may be refused thousands of times
FORGOTTEN_S = 300.0  # a refused pod is tried again after this long, whatever happens


class Place(Enum):
    """Where a pod is."""

    GATED = "gated"
    ACTIVE = "active"
    BACKOFF = "backoff"
    ERROR_BACKOFF = "error back-off"
    REFUSED = "refused"
    IN_FLIGHT = "in flight"


@dataclass(eq=False, slots=True)
class Entry:
    """One unbound pod of the profile.

    Attributes:
        raw, pod: as last seen.
        since: monotonic seconds when it entered its place.
        refusals, errors: attempts that count for the back-off.
        woken: something happened while it was in flight that would have woken it.
        ticket: number of its valid ticket in a heap.
    """

    raw: Object
    pod: Pod
    place: Place = Place.GATED
    since: float = 0.0
    refusals: int = 0
    errors: int = 0
    woken: bool = False
    ticket: int = 0

    def backoff_until(self) -> float:
        """Return when this pod may be tried again."""
        attempts = self.errors or self.refusals
        return (
            self.since + min(BACKOFF_S * 2 ** min(attempts - 1, _DOUBLINGS_MOST), BACKOFF_MOST_S)
            if attempts
            else self.since
        )


class SchedulingQueue:
    """The queue; `on_work` is called when there may be a pod to pop."""

    def __init__(self, on_work: Callable[[], None]) -> None:
        """Start empty."""
        self.entries: dict[str, Entry] = {}
        self._on_work = on_work
        self._active: list[tuple[int, float, int, str]] = []
        self._backoff: dict[Place, list[tuple[float, int, str]]] = {Place.BACKOFF: [], Place.ERROR_BACKOFF: []}
        self._refused: dict[str, Entry] = {}
        self._in_flight: dict[str, Entry] = {}
        self._tickets = 0

    def add(self, raw: Object, pod: Pod, now: float) -> None:
        """Take in a new pod."""
        entry = self.entries[pod.uid] = Entry(raw, pod, since=now)
        if not pod.gates:
            self._activate(entry, now)

    def update(self, raw: Object, pod: Pod, now: float) -> None:
        """Take in a pod's new state: it wakes this pod, and ungates it when its gates are gone."""
        entry = self.entries.get(pod.uid)
        if entry is None:
            self.add(raw, pod, now)
            return
        entry.raw, entry.pod = raw, pod
        if entry.place is Place.GATED and not pod.gates:
            self._activate(entry, now)
        elif entry.place is Place.REFUSED:
            self._wake(entry, now)
        elif entry.place is Place.IN_FLIGHT:
            entry.woken = True

    def remove(self, uid: str) -> None:
        """Forget a pod that is bound, deleted or given up."""
        self.entries.pop(uid, None)
        self._refused.pop(uid, None)
        self._in_flight.pop(uid, None)

    def wake_all(self, now: float, *, priority_most: int | None = None) -> None:
        """Let all refused pods be tried again, or those up to a priority."""
        for entry in list(self._refused.values()):
            if priority_most is None or entry.pod.request.priority <= priority_most:
                self._wake(entry, now)
        for entry in self._in_flight.values():
            entry.woken = entry.woken or priority_most is None or entry.pod.request.priority <= priority_most

    def pop(self, now: float) -> Entry | None:
        """Return the pod to try next; one that backs off from a refusal when nobody else is there."""
        while self._active:
            *_, ticket, uid = heapq.heappop(self._active)
            entry = self._valid(uid, ticket)
            if entry is not None:
                return self._take_off(entry, now)
        backing_off = self._backoff[Place.BACKOFF]
        while backing_off:
            _, ticket, uid = heapq.heappop(backing_off)
            entry = self._valid(uid, ticket)
            if entry is not None:
                return self._take_off(entry, now)
        return None

    def refuse(self, entry: Entry, now: float) -> None:
        """Put a pod back that fits nowhere; straight into back-off if something happened meanwhile."""
        self._in_flight.pop(entry.pod.uid, None)
        entry.refusals, entry.errors, entry.since = entry.refusals + 1, 0, now
        if entry.woken:
            self._back_off(entry, Place.BACKOFF)
        else:
            entry.place = Place.REFUSED
            self._refused[entry.pod.uid] = entry

    def fail(self, entry: Entry, now: float) -> None:
        """Put a pod back whose attempt broke."""
        self._in_flight.pop(entry.pod.uid, None)
        entry.errors, entry.since = entry.errors + 1, now
        self._back_off(entry, Place.ERROR_BACKOFF)

    def flush(self, now: float) -> None:
        """Once a second: end back-offs that are over, and wake who was refused long ago."""
        for place, heap in self._backoff.items():
            while heap and heap[0][0] <= now:
                _, ticket, uid = heapq.heappop(heap)
                entry = self._valid(uid, ticket)
                if entry is not None and entry.place is place:
                    self._activate(entry, entry.since)
        for entry in [one for one in self._refused.values() if one.since + FORGOTTEN_S <= now]:
            self._wake(entry, now)

    def _valid(self, uid: str, ticket: int) -> Entry | None:
        entry = self.entries.get(uid)
        return entry if entry is not None and entry.ticket == ticket else None

    def _take_off(self, entry: Entry, now: float) -> Entry:
        self._tickets += 1
        entry.place, entry.ticket, entry.woken, entry.since = Place.IN_FLIGHT, self._tickets, False, now
        self._in_flight[entry.pod.uid] = entry
        return entry

    def _activate(self, entry: Entry, since: float) -> None:
        self._tickets += 1
        entry.place, entry.since, entry.ticket = Place.ACTIVE, since, self._tickets
        heapq.heappush(self._active, (-entry.pod.request.priority, since, self._tickets, entry.pod.uid))
        self._on_work()

    def _back_off(self, entry: Entry, place: Place) -> None:
        self._tickets += 1
        entry.place, entry.ticket = place, self._tickets
        heapq.heappush(self._backoff[place], (entry.backoff_until(), self._tickets, entry.pod.uid))
        self._on_work()

    def _wake(self, entry: Entry, now: float) -> None:
        self._refused.pop(entry.pod.uid, None)
        if entry.backoff_until() <= now:
            self._activate(entry, entry.since)
        else:
            self._back_off(entry, Place.BACKOFF)
