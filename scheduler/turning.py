"""The turn of the queue on the live state: who waits is lined up, decided in slices, claimed at once, then committed.

Deciding and claiming one unit is one synchronous step, so nothing can change in between. Between two slices others run;
whatever they changed that the turn relies on (the nodes' shape, the tree of queues) ends it, and the next one begins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import structlog

from policies.columns import BoolArray
from scheduler import GATE
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.decision.intents import TTL_S
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.faults import fault
from scheduler.growing import FOR_ROOM, Grower
from scheduler.intake.allocation import read_allocation
from scheduler.inventory.asks import shape
from scheduler.kube.port import Cluster
from scheduler.ledger.lifecycle import HOLDING
from scheduler.model.pod import Pod
from scheduler.model.reservation import Change, Row, State
from scheduler.queueing.line import Gang, Waiting, line_up
from scheduler.queueing.order import rank_of
from scheduler.queueing.release import Window
from scheduler.queueing.together import Together
from scheduler.queueing.turn import Amounts, Barrier, Turn, Unit
from scheduler.releasing import Releaser
from scheduler.settling import Settler, Writer
from scheduler.waiting import BEHIND, PENDING, masked_word

log = structlog.get_logger(__name__)

LONGEST_S = 60.0
BROKEN_S = 1.0  # after a commit that failed
SETTLING_S = 0.1  # somebody is busy with a request that waits: look again soon
GANG_US = 60_000_000
KINDS_MAX = 4096
HOPS = 8  # turns of the loop between two slices: a call goes from its socket through several tasks to its answer
PARTLY_BOUND = frozenset({State.BOUND, State.RUNNING})

Part = tuple[Change, ...]


@dataclass(slots=True)
class Turner:
    """Takes turns while pods wait.

    Attributes:
        waiting: uids of our pods that may be decided: held by our gate alone, or refused by kube-scheduler.
        bell: rings when somebody has come.
        grower: asks for new nodes.
        decided: units decided so far.
    """

    desk: Desk
    writer: Writer
    releaser: Releaser
    clock: Clock
    grower: Grower
    slice_s: float = 0.02
    waiting: dict[str, None] = field(default_factory=dict)
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    decided: int = 0
    _news: bool = True
    _seen: tuple[int, int, int] = (-1, -1, -1)
    _next_s: float = 0.0
    _parts: list[Part] = field(default_factory=list)  # of the unit that was placed last
    _capacity: tuple[int, Amounts] = (-1, {})
    _partly: dict[Gang, int] = field(default_factory=dict)  # when the first of a gang that is bound in part was bound
    _together: Together = field(init=False)
    _never: set[Hashable] = field(default_factory=set)  # kinds of gangs that no turn could place, empty as nodes may be
    _nowhere: dict[Hashable, str] = field(default_factory=dict)  # kind -> what every node lacks for it, or empty
    _nowhere_at: int = -1  # layout of the columns

    def __post_init__(self) -> None:
        """Make what judges gangs."""
        self._together = Together(self.desk.registry, self.desk.policies)

    @classmethod
    def of(  # noqa: PLR0917 - the outside world, part by part
        cls, desk: Desk, cluster: Cluster, writer: Writer, settler: Settler, clock: Clock, settings: Settings
    ) -> Turner:
        """Return one with what lets go its reservations, told of everybody who begins to wait."""
        window = Window(settings.queue.releaseWindow, settings.queue.releaseWindow)
        releaser = Releaser(desk, cluster, clock, settler, settings.namespace, window)
        grower = Grower.of(desk, releaser, clock, settings)
        turner = cls(desk, writer, releaser, clock, grower, settings.queue.turnSlice)
        grower.waits = turner.waits
        settler.stirred, settler.excuse = turner.ring, releaser.excuse
        return turner

    # who waits

    def watch(self, pod: Pod) -> None:
        """Take note of a pod as the API server shows it; what it gave back may serve others."""
        self._stirred()
        words = self.desk.order.words
        open_ = pod.ours and not (pod.node or pod.terminal or pod.deleting)
        refused = (open_ and self.grower.watch(pod)) or pod.unschedulable
        if open_ and (pod.gates == (GATE,) or (refused and not pod.gates)):
            if pod.uid not in self.waiting:
                self.waiting[pod.uid] = None
                if words.get(pod.uid) == "WaitingForGate":
                    del words[pod.uid]
                self.ring()
            return
        self.waiting.pop(pod.uid, None)
        if open_ and pod.gates:
            words[pod.uid] = "WaitingForGate"
        elif not refused:
            words.pop(pod.uid, None)

    def forget(self, uid: str) -> None:
        """The pod is gone."""
        self._stirred()
        self.waiting.pop(uid, None)
        self.grower.growth.forget(uid)
        self.desk.order.forget(uid)

    def parked(self, pod: Pod) -> None:
        """Take note that kube-scheduler's plugins refuse a pod wherever it has room, so that it did not even ask.

        What they refuse is remembered, and the reservation is given up.
        """
        desk = self.desk
        desk.called_s, row = self.clock.monotonic(), desk.book.rows.get(pod.uid)
        if row is None or row.state is not State.RESERVED or pod.nominated != row.node:
            return
        if desk.order.astray.get(pod.uid, (0, ""))[0] == row.epoch:
            return  # it did ask, and was refused
        freed = desk.registry.freed
        desk.let_go(pod.uid)
        desk.learn(pod, np.zeros(0, np.intp), row.node)
        desk.hold_claim(row, pod, read_allocation(row.allocation))
        desk.registry.freed = freed
        desk.order.astray[pod.uid] = row.epoch, "NominationRefused"

    def _stirred(self) -> None:
        """Have a look soon if something was freed."""
        if self.waiting and self.desk.registry.freed != self._seen[0]:
            self.bell.set()

    def ring(self) -> None:
        """Somebody has come, or may be decided now: take a turn soon."""
        self._news = True
        self.bell.set()

    # the turn

    async def step(self) -> None:
        """Take a turn if something has changed since the last one, or somebody's back-off has ended."""
        self.desk.lapse()
        self._watch_gangs()
        now_s = self.clock.monotonic()
        seen = self._state()
        if not self.waiting:
            self.desk.order.barriers = {}
            return
        if seen == self._seen and not self._news and now_s < self._next_s:
            return
        if not self.desk.dependencies.closed:
            return
        room = self.releaser.room()
        if room <= 0:
            if self.releaser.alone():
                self.desk.order.words |= dict.fromkeys(self._idle(), "SchedulerNotRunning")
            return
        self._seen, self._news, self._next_s = self._state(), False, now_s + LONGEST_S
        await self._turn(room)

    def _state(self) -> tuple[int, int, int]:
        registry = self.desk.registry
        return registry.freed, registry.columns.layout, self.desk.queues.generation

    def _idle(self) -> Iterator[str]:
        rows = self.desk.book.rows
        return (uid for uid in self.waiting if (row := rows.get(uid)) is not None and row.state is State.QUEUED)

    async def _turn(self, room: int) -> None:
        order, queues = self.desk.order, self.desk.queues
        self.grower.begin()
        generation, lined = queues.generation, [one async for one in self._lined()]
        if queues.generation != generation:
            self.ring()  # who is lined up may be in a queue that is gone
            return
        usage = order.charging.settle(self.desk.book.rows)
        units, incomplete = line_up(lined, self._held())
        order.words |= dict.fromkeys(incomplete, "WaitingForGang")
        names = {unit.queue for unit in units}
        now_us, several = self.clock.wall_us(), len(names) > 1
        used = {name: queues.spent.used(name, now_us) for name in names} if several else {}
        turn = Turn(units, queues.quota, usage, self, used=used, capacity=self._cluster() if several else {})
        self._never.clear()
        async with asyncio.TaskGroup() as commits:
            try:
                await self._go_through(turn, room, commits)
            except Exception:
                log.exception("turn.failed")  # what is claimed is committed and let go all the same
                self._next_s = self.clock.monotonic() + BROKEN_S
        self._next_s = min(self._next_s, self.grower.due_s())

    async def _go_through(self, turn: Turn, room: int, commits: asyncio.TaskGroup) -> None:
        """Decide one unit after the other, slice by slice, and then for whom new nodes are asked."""
        state, began_s, whole = self._state()[1:], self.clock.monotonic(), True
        refused: list[tuple[Unit, str]] = []
        while room > 0 and (decision := turn.step()) is not None:
            self.decided += 1
            if decision.granted is not None:
                room -= len(decision.unit.members)
                commits.create_task(self._commit(self._parts))
            elif decision.word:
                word = "ExceedsClusterSize" if decision.unit.kind in self._never else decision.word
                self.grower.say(decision.unit.members, self._word(decision.unit, word))
                refused.append((decision.unit, word))
            if self.clock.monotonic() - began_s > self.slice_s:
                began_s = await self._let_others()
                whole = self._state()[1:] == state and self.desk.dependencies.closed
                if not whole:
                    break
        whole = whole and room > 0
        self._leave(turn, state[0], whole=whole)
        if whole:
            await self._name_hopeless(turn)
        began_s = self.clock.monotonic()
        for asked in self.grower.after(chain(refused, ((unit, "") for unit in turn.undecided()))) if whole else ():
            self._news = self._news or asked  # they block others from now on
            if self.clock.monotonic() - began_s > self.slice_s:
                began_s = await self._let_others()

    async def _name_hopeless(self, turn: Turn) -> None:
        """Say of those whose turn has not come what every node lacks for them, where none could ever take them."""
        began_s = self.clock.monotonic()
        for unit in list(turn.undecided()):
            if (word := self._word(unit, BEHIND)) != BEHIND:
                self.grower.say(unit.members, word)
            if self.clock.monotonic() - began_s > self.slice_s:
                began_s = await self._let_others()

    async def _let_others(self) -> float:
        """Let others run between two slices, and return when the next one begins."""
        for _ in range(HOPS):
            await self.clock.sleep(0)
        return self.clock.monotonic()

    def _leave(self, turn: Turn, layout: int, *, whole: bool) -> None:
        """Leave for those who come between two turns what this one found, on the nodes as they were when it began."""
        order = self.desk.order
        left = list(turn.undecided())
        word = BEHIND if whole else PENDING
        self.grower.say(chain.from_iterable(unit.members for unit in left), word)
        nodes = self.desk.registry.snapshot().nodes
        order.barriers, order.layout = turn.barriers(nodes), layout
        if not whole:
            self.ring()

    def _word(self, unit: Unit, word: str) -> str:
        """Return why a unit waits: where no node could take it were it empty, what all of them lack."""
        layout, pod = self.desk.registry.columns.layout, self.desk.registry.pods.get(unit.members[0])
        if word not in FOR_ROOM or pod is None or pod.uid in self.grower.growth.asked:
            return word
        if layout != self._nowhere_at or len(self._nowhere) >= KINDS_MAX:
            self._nowhere_at = layout
            self._nowhere.clear()
        if unit.kind not in self._nowhere:
            self._nowhere[unit.kind] = "" if self.desk.could(pod).any() else masked_word(self.desk, pod)
        return self._nowhere[unit.kind] or word

    async def _lined(self) -> AsyncIterator[Waiting]:
        """Yield who may be decided now, slice by slice, and say of the others why they may not."""
        desk, now_us = self.desk, self.clock.wall_us()
        words, now_s = desk.order.words, self.clock.monotonic()
        began_s = now_s
        for uid in list(self.waiting):
            if self.clock.monotonic() - began_s > self.slice_s:
                began_s = await self._let_others()
            pod, row = desk.registry.pods.get(uid), desk.book.rows.get(uid)
            if pod is None or row is None or not self._may(pod, row):
                if uid in self.releaser.settler.working:
                    self._next_s = min(self._next_s, now_s + SETTLING_S)
                elif self.desk.intents.get(uid) is not None:  # nothing rings when it lapses
                    self._next_s = min(self._next_s, now_s + TTL_S)
                continue
            if row.not_before_us > now_us:
                words[uid] = "BackingOff"
                self._next_s = min(self._next_s, now_s + (row.not_before_us - now_us) / 1_000_000)
            elif word := desk.queues.refusal(pod.request.queue, pod.request.namespace):
                words[uid] = word
            else:
                try:
                    found = self._waiting(pod, row)
                except Exception as error:  # noqa: BLE001 - logged there
                    self._pass_over(uid, error)
                else:
                    yield found

    def _pass_over(self, uid: str, error: Exception) -> None:
        """Leave a pod out of turns until it changes, because a decision about it raised: others go on."""
        log.error("object.poison", kind="pods", uid=uid, exc_info=error)
        self.desk.registry.poison.add(("pods", uid))
        self.ring()

    def _may(self, pod: Pod, row: Row) -> bool:
        """Say whether a pod waits for a turn: not decided, not refused for good, and no bind of it is on its way."""
        return (
            row.state is State.QUEUED
            and pod.uid not in self.releaser.settler.working  # its former reservation may not be given back yet
            and pod.request.refusal is None
            and self.desk.intents.get(pod.uid) is None
            and ("pods", pod.uid) not in self.desk.registry.poison
        )

    def _waiting(self, pod: Pod, row: Row) -> Waiting:
        desk, request = self.desk, pod.request
        least, most = desk.order.charging.bounds(request, lambda: desk.could(pod))
        gang = (request.namespace, request.queue, request.gang) if request.gang and request.gang_size > 1 else None
        special = desk.lessons.knows(pod.uid) or desk.intents.excluded(pod.uid, self.clock.monotonic())
        kind = (shape(request), pod.uid if special else self.grower.watch(pod))
        return Waiting(pod.uid, request.queue, rank_of(request, row), kind, least, most, gang, request.gang_size)

    def _held(self) -> Counter[Gang]:
        rows = (row for row in self.desk.book.rows.values() if row.gang and row.state in HOLDING)
        return Counter((row.namespace, row.queue, row.gang) for row in rows)

    def _cluster(self) -> Amounts:
        layout = self.desk.registry.columns.layout
        if self._capacity[0] != layout:
            self._capacity = layout, self.desk.order.charging.capacity()
        return self._capacity[1]

    # what the turn asks of the cluster

    def waits(self, unit: Unit) -> bool:
        """Say whether all members still wait."""
        pods, rows = self.desk.registry.pods, self.desk.book.rows
        return all(
            uid in self.waiting and (row := rows.get(uid)) is not None and self._may(pods[uid], row)
            for uid in unit.members
        )

    def could(self, unit: Unit) -> BoolArray:
        """Return ``[N]`` the nodes that any member could use, were they empty; none where they cannot take all."""
        pods = [self.desk.registry.pods[uid] for uid in unit.members]
        if not self.waits(unit):  # it was passed over: it stands in nobody's way
            return np.zeros(self.desk.registry.snapshot().nodes, np.bool_)
        each = [self.desk.could(pod) & self._taught(pod.uid) for pod in pods]
        found = next((one for one in each if not one.any()), np.logical_or.reduce(each))
        if len(pods) > 1 and found.any() and not self._together.able(pods, each):
            found = np.zeros_like(found)
            self._never.add(unit.kind)
        return self.grower.awaited(unit, found)

    def awaited(self, unit: Unit) -> bool:
        """Say whether a new node is asked for on its behalf."""
        return self.grower.growth.asks(unit.members)

    def _taught(self, uid: str) -> BoolArray:
        nodes = self.desk.registry.snapshot().nodes
        found = self.desk.lessons.of(uid, nodes, self.clock.monotonic())
        return np.ones(nodes, np.bool_) if found is None else found

    def place(self, unit: Unit, barrier: Barrier | None) -> Amounts | None:
        """Reserve for all members, in memory, or for none."""
        registry = self.desk.registry
        freed, parts, total = registry.freed, list[Part](), dict[str, int]()
        for uid in unit.members:
            try:
                found = self.desk.reserve(registry.pods[uid], barrier)
            except Exception as error:  # noqa: BLE001 - logged there
                self._pass_over(uid, error)
                found = None
            if found is None:
                self.grower.found[unit.members[0]] = len(parts)
                for part in reversed(parts):
                    self.desk.unclaim(part)
                registry.freed = freed  # what was taken for a moment only is no news
                return None
            parts.append(found[0])
            for key, amount in found[1].items():
                total[key] = total.get(key, 0) + amount
        self._parts = parts
        return total

    async def _commit(self, parts: Sequence[Part]) -> None:
        """Make one unit durable, all of it or nothing, then let it go."""
        try:
            await fault("turn.commit.before")
            await self.writer.commit(tuple(chain.from_iterable(parts)))
        except Exception as error:  # after a bug, too, memory holds nothing that the ledger does not
            for part in reversed(parts):
                self.desk.unclaim(part)
            self._next_s = self.clock.monotonic() + BROKEN_S
            self._seen = self._state()
            bug, ids = not isinstance(error, StoreError), [part[-1].after.id for part in parts]
            log.warning("turn.not_committed", requests=ids, error=str(error), exc_info=bug)
            return
        await fault("turn.commit.after")
        for part in parts:
            self.releaser.add(part[-1].after.id)

    # gangs

    def _watch_gangs(self) -> None:
        """Give up what stays reserved for a minute beside members that are bound; what is bound goes on.

        A former process may have seen it first: what the ledger noted of its members counts.
        """
        now_us, partly = self.clock.wall_us(), dict[Gang, int]()
        for gang, rows in self._gangs().items():
            bound = [row.updated_us for row in rows if row.state in PARTLY_BOUND]
            reserved = [row for row in rows if row.state is State.RESERVED]
            if bound and reserved:
                partly[gang] = first_us = min(*bound, self._partly.get(gang, now_us))
                self._give_up(gang, [row for row in reserved if now_us - max(row.updated_us, first_us) >= GANG_US])
        self._partly = partly

    def _gangs(self) -> dict[Gang, list[Row]]:
        found: dict[Gang, list[Row]] = {}
        if self._partly or self.releaser.out:
            for row in self.desk.book.rows.values():
                if row.gang and row.state in HOLDING:
                    found.setdefault((row.namespace, row.queue, row.gang), []).append(row)
        return found

    def _give_up(self, gang: Gang, late: Sequence[Row]) -> None:
        astray = self.desk.order.astray
        found = [row for row in late if astray.get(row.id, (0, ""))[0] != row.epoch]
        for row in found:
            astray[row.id] = row.epoch, "GangIncomplete"
        if found:
            log.warning("gang.incomplete", gang="/".join(gang), given_up=sorted(row.name for row in found))
