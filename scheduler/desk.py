"""The state one event loop owns, and what it answers without waiting: /filter, /prioritize and the claim of a bind.

Every method is synchronous, so no two of them can interleave: what a method sees stays true until it returns. Nothing
here is durable; a claim becomes so when the caller commits the changes that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from policies.columns import Ask, BoolArray, Kind, Mix, Mode
from scheduler.clock import Clock
from scheduler.decision import explain
from scheduler.decision.board import Board, Boards
from scheduler.decision.catalog import FILTER_MASKS, TURN_MASKS
from scheduler.decision.choosing import whole
from scheduler.decision.combine import Rows, scored
from scheduler.decision.intents import Intents
from scheduler.decision.lessons import Lessons
from scheduler.decision.pipeline import Policies, Verdict, judge
from scheduler.decision.placing import Containers, DoesNotFit, place
from scheduler.dependencies import Dependencies
from scheduler.geometry import placements
from scheduler.intake.allocation import read_allocation
from scheduler.inventory.asks import Asks, shape
from scheduler.inventory.mix import Arrivals
from scheduler.inventory.registry import Booking, Registry, Source, booking, unwritten
from scheduler.ledger.ledger import Book, advance
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.queues import Queues
from scheduler.ledger.quota import lacking, would_borrow
from scheduler.ledger.reconcile import Door
from scheduler.ledger.taking import taken
from scheduler.model.allocation import Allocation
from scheduler.model.node import Node
from scheduler.model.pod import DeviceAsk, Pod
from scheduler.model.reservation import Change, Event, Row, State
from scheduler.queueing.charging import Charging
from scheduler.queueing.order import Order
from scheduler.queueing.turn import Amounts, Barrier

Later: TypeAlias = Callable[[Callable[[], None]], None]

REFUSALS_MAX = 100_000
OFFERED_MAX = 1024  # rows kept with an intent: 8 kB; kube-scheduler's default sampling offers fewer


@dataclass(frozen=True, slots=True)
class Answer:
    """What /filter says: the best nodes, or one constant reason for all that were offered."""

    names: list[str]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Aside:
    """What was there before a pod's own intent was forgotten."""

    held: Booking | None
    freed: int


@dataclass(slots=True)
class Desk:
    """Inventory, ledger image, intents and policies, side by side.

    Attributes:
        dependencies: what nothing new is decided without.
        fence: the ledger's fence epoch of this process; every change carries it.
        count: how many nodes /filter names (K).
        order: what order and quota say of a pod.
        called_s: when kube-scheduler called last, on the monotonic clock.
        reserve_s: how long a reservation may stay without a Binding.
    """

    clock: Clock
    policies: Policies
    fence: int = 0
    count: int = 1
    reserve_s: float = 120.0
    registry: Registry = field(default_factory=lambda: Registry(placements()))
    book: Book = field(default_factory=Book)
    queues: Queues = field(default_factory=Queues)
    intents: Intents = field(default_factory=Intents)
    lessons: Lessons = field(default_factory=Lessons)
    dependencies: Dependencies = field(init=False)
    order: Order = field(init=False)
    called_s: float | None = None
    asks: Asks = field(init=False)
    _boards: Boards = field(init=False)
    arrivals: Arrivals = field(init=False)
    _refusals: dict[str, tuple[int, DeviceAsk, str]] = field(
        default_factory=dict
    )  # uid -> (registry.freed, ask, reason)

    def __post_init__(self) -> None:
        """Make the ask reader for this registry, what learns from the asks, and the boards."""
        self.dependencies = Dependencies(self.clock)
        self.asks = Asks(self.registry)
        self.order = Order(self.queues, Charging(self.queues, self.registry))
        self._boards = Boards(self.policies)
        self.arrivals = Arrivals(self.asks)

    # extender verbs

    def filter(self, pod: Pod, offered: Sequence[str], later: Later = lambda act: act()) -> Answer:
        """Name the best of the offered nodes, and intend the first of them for this pod.

        A pod that fitted nowhere in the cluster is refused at once until something was freed. `later` may put off
        noting the intent, but only until the reply is on its way: nothing else may be asked of the desk before.
        """
        self.lapse()
        self.called_s = self.clock.monotonic()
        held = self._standing(pod)
        if held is not None:
            return held if held.reason or held.names[0] in offered else self._elsewhere(pod, offered)
        if self.lessons.knows(pod.uid) and list(offered) != [pod.nominated]:
            self.learn(pod, self.rows(pod.uid, offered))
        rows, reason, behind = self._choice(pod, offered)
        if reason or pod.request.claims:
            return Answer([] if reason else list(offered), reason)
        aside = self._set_aside(pod.uid)
        board = self._board(pod, FILTER_MASKS)
        best = board.best(rows, self.count)
        if best.size:
            names = [self.registry.columns.names[row] for row in best.tolist()]

            def mean() -> None:
                kept = rows if len(rows) <= OFFERED_MAX else None
                self.intend(pod, int(best[0]), board.ask, named=names, offered=kept)
                self._put_back(pod.uid, aside)

            later(mean)
            return Answer(names)
        answer = self._refusal(pod, rows, behind)
        self._put_back(pod.uid, aside)
        return answer

    def _choice(self, pod: Pod, offered: Sequence[str]) -> tuple[Rows, str, str]:
        """Return the offered rows that order and quota leave to a pod, the word why none, and why not the others."""
        nowhere = np.zeros(0, np.intp)
        if word := self.order.refusal(pod):
            return nowhere, word, ""
        open_, word = self.order.open(pod, self.book.rows, self.registry.columns.layout)
        if open_ is not None and not open_.any():
            return nowhere, word, ""
        if known := self.known_refusal(pod):
            return nowhere, known, ""
        rows = self.rows(pod.uid, offered)
        if open_ is None or not rows.size:
            return rows, "", ""
        left = rows[open_[rows]]
        return left, "" if left.size else word, word if left.size < rows.size else ""

    def _refusal(self, pod: Pod, rows: Rows, behind: str) -> Answer:
        """Say why none of these nodes takes the pod; when several were offered and no other would, remember it."""
        if not len(rows) and self.intents.excluded(pod.uid, self.clock.monotonic()):
            return Answer([], "BackingOff")
        board = self._board(pod, FILTER_MASKS)
        if behind and board.could().any():
            return Answer([], behind)
        if len(rows) == 1:
            return Answer([], board.settle(rows).headline(rows))
        failed = board.settle()
        reason = failed.headline(rows)
        if (failed.first >= 0).all():
            self._refuse(pod, reason)
        return Answer([], reason)

    def prioritize(self, pod: Pod, offered: Sequence[str]) -> list[tuple[str, int]]:
        """Score the offered nodes 0..10; only the best one gets 10, so that kube-scheduler's ties cannot undo it."""
        if not offered:
            return []
        intent = self.intents.get(pod.uid)
        if intent is not None and set(offered) <= set(intent.named):
            return scored(intent.named, offered)
        own = self.registry.held(pod.uid)
        aside = self._set_aside(pod.uid)
        best = self._board(pod, FILTER_MASKS).best(self.rows(pod.uid, offered), len(offered))
        if own is not None and intent is not None:
            self.intents.note(pod.uid, intent.node, self.clock.monotonic(), intent.named, intent.offered)
            self.registry.say(pod.uid, Source.INTENDED, own)
        self._put_back(pod.uid, aside)
        return scored([self.registry.columns.names[row] for row in best.tolist()], offered)

    def claim(self, pod: Pod, name: str) -> tuple[Change, ...]:
        """Take devices for a pod on one node in memory, and return the changes to commit.

        A reservation is bound as it is; on another node than it names it moves there.

        Raises:
            DoesNotFit: the node is unknown or no longer has what the pod asks; nothing was changed.
        """
        self.called_s = self.clock.monotonic()
        node, row = self.registry.nodes.get(name), self.registry.columns.rows.get(name)
        if node is None or row is None:
            raise DoesNotFit("NoMatchingNode")
        known = self.book.rows.get(pod.uid)
        reserved = known if known is not None and known.state is State.RESERVED else None
        if reserved is not None and reserved.node == name:
            self.drop_intent(pod.uid)
            bound = advance(reserved, Event.BIND, now_us=self.clock.wall_us(), fence=self.fence)
            self.book.apply((bound,))
            return (bound,)
        intent = self.intents.get(pod.uid)
        offered = intent.offered if intent is not None and intent.node == name else None
        aside = self._set_aside(pod.uid)
        if reserved is not None:
            self.let_go(pod.uid)
        try:
            changes = self._take(pod, node, row, offered=offered)
        except BaseException:
            if reserved is not None:
                self.hold_claim(reserved, pod, read_allocation(reserved.allocation))
            raise
        self._put_back(pod.uid, aside)
        return changes

    def _take(self, pod: Pod, node: Node, row: int, *, offered: Rows | None) -> tuple[Change, ...]:
        """Judge one node and book it. Raises DoesNotFit; then nothing was changed."""
        board, here = self._board(pod, FILTER_MASKS), np.asarray([row], np.intp)
        reason = board.settle(here if offered is None else np.append(offered, here)).headline(here)
        if reason and not pod.request.claims:
            raise DoesNotFit(reason)
        return self._book(pod, node, board, row, offered=offered)

    def reserve(self, pod: Pod, barrier: Barrier | None = None) -> tuple[tuple[Change, ...], Amounts] | None:
        """Take the best node of the whole cluster for a waiting pod, in memory, with devices and quota.

        Args:
            pod: ours, without a row that holds anything.
            barrier: what those before it leave; None = nobody is in its way.

        Returns:
            The changes to commit and what they took of the quota; None where no node takes the pod now.
        """
        self.drop_intent(pod.uid)
        board = self._board(pod, TURN_MASKS)
        now_s, columns = self.clock.monotonic(), self.registry.columns
        open_ = self.order.affordable(pod.request, barrier)
        taught = self.lessons.of(pod.uid, self.registry.snapshot().nodes, now_s)
        if taught is not None:
            open_ = taught if open_ is None else open_ & taught
        rows = None if open_ is None else np.flatnonzero(open_)
        if excluded := self.intents.excluded(pod.uid, now_s):
            left_out = [columns.rows.get(name, -1) for name in excluded]
            rows = np.setdiff1d(np.arange(self.registry.snapshot().nodes) if rows is None else rows, left_out)
        board.settle()  # the record counts them all
        best = board.best(rows)
        if not best.size:
            return None
        row = int(best[0])
        try:
            changes = self._book(pod, self.registry.nodes[columns.names[row]], board, row, bind=False)
        except DoesNotFit:
            return None
        return changes, self.order.charging.take(changes[-1].after)

    def could(self, pod: Pod) -> BoolArray:
        """Return ``[N]`` the nodes that a pod could use, were they empty."""
        return self._board(pod, TURN_MASKS).could()

    def fits_now(self, pod: Pod) -> bool:
        """Say whether a node that kube-scheduler would not refuse takes a pod now, whoever is before it."""
        taught = self.lessons.of(pod.uid, self.registry.snapshot().nodes, self.clock.monotonic())
        rows = None if taught is None else np.flatnonzero(taught)
        return bool(self._board(pod, TURN_MASKS).best(rows).size)

    def unclaim(self, changes: tuple[Change, ...]) -> None:
        """Undo a claim or a reservation whose commit failed, or whose gang does not fit."""
        after = changes[-1].after
        self.book.revert(changes)
        now, pod = self.book.rows.get(after.id), self.registry.pods.get(after.id)  # another commit may have failed too
        if now is None or now.state not in HOLDING:
            self.let_go(after.id)
        elif now.node != after.node and pod is not None:
            self.hold_claim(now, pod, read_allocation(now.allocation))

    def _book(
        self,
        pod: Pod,
        node: Node,
        board: Board,
        row: int,
        *,
        offered: Rows | None = None,
        bind: bool = True,
    ) -> tuple[Change, ...]:
        """Take devices and quota on a node that has just been judged. Raises DoesNotFit; then nothing was changed."""
        allocation = self._allocation(pod, node, row, board.ask)
        usage, queue = self.order.charging.settle(self.book.rows), pod.request.queue
        amounts = self.order.charging.of(pod.request, node, allocation.devices())
        if amounts and lacking(self.queues.quota, usage, queue, amounts):
            raise DoesNotFit("WaitingForQuota")
        borrowed = bool(amounts) and would_borrow(self.queues.quota, usage, queue, amounts)
        try:
            changes = taken(
                self.book.rows.get(pod.uid),
                pod.request,
                allocation,
                fence=self.fence,
                now_us=(now_us := self.clock.wall_us()),
                until_us=now_us + round(self.reserve_s * 1_000_000),
                record=self._record(board, row, offered),
                borrowed=borrowed,
                credit=self.book.credits.get(pod.request.workload),
                bind=bind,
            )
        except ValueError as error:  # container names so long that the allocation cannot be written
            raise DoesNotFit("InvalidRequest") from error
        self.registry.say(pod.uid, Source.CLAIMED, booking(pod, node.name, allocation))
        self.book.apply(changes)
        self.order.charging.take(changes[-1].after, amounts)
        self._refusals.pop(pod.uid, None)
        self.order.words.pop(pod.uid, None)
        return changes

    def let_go(self, uid: str) -> None:
        """Give back what the ledger held for a Request: its room and its quota."""
        self.registry.unsay(uid, Source.CLAIMED)
        self.order.charging.give_back(uid)

    def _elsewhere(self, pod: Pod, offered: Sequence[str]) -> Answer:
        """Answer for a pod whose reserved node kube-scheduler does not offer: its own plugins refuse that node.

        The best of the others is intended, and a bind moves the reservation there. What was offered is remembered.
        """
        reserved = self.book.rows[pod.uid]
        if reserved.state is not State.RESERVED or (len(offered) == 1 and offered[0] == pod.nominated):
            return Answer([], "ReservedForOther")
        rows = self.rows(pod.uid, offered)
        freed = self.registry.freed
        self.drop_intent(pod.uid)
        self.let_go(pod.uid)
        self.learn(pod, rows, reserved.node)
        open_ = self.order.affordable(pod.request, None)
        board = self._board(pod, FILTER_MASKS)
        best = board.best(rows if open_ is None else rows[open_[rows]], self.count)
        reason = "" if best.size else board.settle(rows).headline(rows) or "WaitingForQuota"
        self.hold_claim(reserved, pod, read_allocation(reserved.allocation))
        self.registry.freed = freed
        if reason:
            self.order.astray[pod.uid] = reserved.epoch, "NominationRefused"
            return Answer([], reason)
        names = [self.registry.columns.names[row] for row in best.tolist()]
        self.intents.note(
            pod.uid, names[0], self.clock.monotonic(), tuple(names), rows if len(rows) <= OFFERED_MAX else None
        )
        return Answer(names)

    def learn(self, pod: Pod, named: Rows, refused: str = "") -> None:
        """Remember of the nodes with room for a pod, which holds nothing now, those that kube-scheduler names."""
        busy = self._board(pod, TURN_MASKS).settle().first >= 0
        row, live = self.registry.columns.rows.get(refused, -1), self.registry.snapshot().schedulable
        if self.lessons.learn(pod.uid, named, row, live, busy, self.clock.monotonic()):
            self.registry.freed += 1  # it may fit now

    # intents

    def intend(self, pod: Pod, row: int, ask: Ask, *, named: Sequence[str] = (), offered: Rows | None = None) -> None:
        """Note, in memory and for 15 s, that this pod will take this node.

        Args:
            pod: who.
            row: the node's.
            ask: what the pod asks.
            named: the nodes of the answer, best first.
            offered: the rows it was chosen from, which the record's runner-up comes from; None = all.
        """
        name = self.registry.columns.names[row]
        held = self._intended(pod, self.registry.nodes[name], row, ask)
        self.intents.note(pod.uid, name, self.clock.monotonic(), tuple(named), offered)
        self.registry.say(pod.uid, Source.INTENDED, held)

    def drop_intent(self, uid: str) -> None:
        """Forget an intent, if there is one."""
        self.intents.drop(uid)
        self.registry.unsay(uid, Source.INTENDED)

    def _set_aside(self, uid: str) -> _Aside | None:
        """Forget the pod's own intent, so that it is decided as if it intended nothing; None where it does not."""
        own = self.registry.held(uid)
        if own is None and self.intents.get(uid) is None:
            return None
        aside = _Aside(own, self.registry.freed)
        self.drop_intent(uid)
        return aside

    def _put_back(self, uid: str, aside: _Aside | None) -> None:
        """When a pod has ended up with the same room as before, nothing was freed for others."""
        if aside is not None and self.registry.held(uid) == aside.held:
            self.registry.freed = aside.freed

    def lapse(self) -> None:
        """Forget intents that are past their time; their nodes are left out for these pods for a while."""
        for uid in self.intents.lapse(self.clock.monotonic()):
            self.registry.unsay(uid, Source.INTENDED)

    def known_refusal(self, pod: Pod) -> str:
        """Return why a pod fits nowhere in the cluster, if that was found and nothing was freed since; else empty."""
        freed, devices, reason = self._refusals.get(pod.uid, (-1, None, ""))
        return reason if freed == self.registry.freed and devices == pod.request.devices else ""

    def last_refusal(self, uid: str) -> str:
        """Return the word a waiting pod was last refused with everywhere, whatever was freed since; empty = none."""
        return self._refusals.get(uid, (-1, None, ""))[2]

    def tidy(self) -> bool:
        """Judge some of the nodes that changed, for the classes asked of late, while nobody waits; False = none."""
        return self._boards.tidy(self.registry.snapshot(), self.mix(), self.registry.columns.layout)

    def forget(self, uid: str) -> None:
        """Drop what is remembered of a Request that is over."""
        self._refusals.pop(uid, None)
        self.lessons.forget(uid)
        self.order.forget(uid)

    def mix(self) -> Mix:
        """Return what was asked lately."""
        return self.arrivals.mix(self.clock.wall_us())

    # for the loops

    def door(self, namespace: str) -> Door:
        """Say what becomes now of who comes, or is held: while the API server is away nobody new is queued."""
        if self.dependencies.api.closed:
            return Door.OPEN
        return Door.HOLDING if self.book.may_hold(namespace) else Door.FULL

    def fits(self, pod: Pod) -> Verdict:
        """Judge a waiting pod on the whole cluster with every mask."""
        snapshot, ask = self.registry.snapshot(), self.asks.ask(pod.request)
        return judge(snapshot, ask, self.mix(), self.policies, TURN_MASKS)

    def rows(self, uid: str, offered: Sequence[str]) -> npt.NDArray[np.intp]:
        """Return the rows of the offered nodes that are known and not left out for this pod."""
        excluded = self.intents.excluded(uid, self.clock.monotonic())
        return self.registry.columns.find([name for name in offered if name not in excluded] if excluded else offered)

    def hold_claim(self, row: Row, pod: Pod, allocation: Allocation | None) -> None:
        """Keep room and quota for a row that the ledger says holds them (at start, or when a bound pod is adopted)."""
        self.registry.say(row.id, Source.CLAIMED, booking(pod, row.node or pod.node, allocation))
        self.order.charging.give_back(row.id)
        self.order.charging.take(row)

    # inside

    def _standing(self, pod: Pod) -> Answer | None:
        """Answer from the ledger where it already knows: placed, refused for good, or in back-off."""
        row = self.book.rows.get(pod.uid)
        if pod.request.refusal is not None:
            return Answer([], pod.request.refusal.reason)
        if row is None or row.state in TERMINAL - {State.FAILED}:
            return None
        if row.state in HOLDING:
            return Answer([row.node])
        if row.state is State.FAILED:
            return Answer([], "AttemptsSpent")
        return Answer([], "BackingOff") if row.not_before_us > self.clock.wall_us() else None

    def _board(self, pod: Pod, masks: tuple[str, ...]) -> Board:
        everywhere = masks is FILTER_MASKS
        board = self._boards.of(shape(pod.request, everywhere=everywhere), masks)
        mix, layout = self.mix(), self.registry.columns.layout
        ask = board.ask_for(mix, layout) or self.asks.ask(pod.request, everywhere=everywhere)
        return board.turn(self.registry.snapshot(), ask, mix, layout)

    def _refuse(self, pod: Pod, reason: str) -> None:
        if len(self._refusals) >= REFUSALS_MAX:
            self._refusals.pop(next(iter(self._refusals)))
        self._refusals[pod.uid] = (self.registry.freed, pod.request.devices, reason)

    def _intended(self, pod: Pod, node: Node, row: int, ask: Ask) -> Booking:
        """Return what a pod will book on a node that passes; whole GPUs are chosen without a word about containers."""
        snapshot = self.registry.snapshot()
        if ask.kind is Kind.NONE or (ask.kind is Kind.WHOLE and not pod.request.claims):
            slots = whole(snapshot, row, ask) if ask.kind is Kind.WHOLE and node.mode is Mode.EXACT else ()
            return unwritten(pod, node.name, slots)
        containers = self._containers(pod, node, row, ask)
        return booking(pod, node.name, Allocation(pod.uid, 0, 0, node.name, "", containers))

    def _containers(self, pod: Pod, node: Node, row: int, ask: Ask) -> Containers:
        """Choose devices on a row that has just been judged, unless the pod has claims: those are not judged here."""
        snapshot, judged = self.registry.snapshot(), not pod.request.claims
        return place(snapshot, row, pod.request, ask, node=node, mix=self.mix(), judged=judged)

    def _allocation(self, pod: Pod, node: Node, row: int, ask: Ask) -> Allocation:
        known = self.book.rows.get(pod.uid)
        epoch = 1 if known is None else known.epoch + (known.state in TERMINAL)
        mode = "exact" if node.mode is Mode.EXACT else "observed"
        return Allocation(pod.uid, epoch, self.fence, node.name, mode, self._containers(pod, node, row, ask))

    def _record(self, board: Board, row: int, offered: Rows | None = None) -> str:
        return explain.record(board, row, self.registry.columns.names, self.registry.generation, rows=offered)
