"""Other people's policies, written from their definitions: what a placement is measured against.

FGD is the fragmentation gradient of Weng et al., "Beware of Fragmentation" (USENIX ATC 2023), with the integer score of
its authors' simulator; the rest are the baselines of the same paper. All but `fgd-stock` and `random` break ties by the
machines' names, as that simulator does; `fgd-stock` breaks them at random, as kube-scheduler does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.devices import MILLI
from bench.quality_replay import Bools, Floats, Ints, Place, Room
from bench.trace import Machine, Task

CPU_MOST, CARDS_MOST = 128_000, 8  # of the largest machine of the published list
TYPICAL = 0.95  # part of the tasks whose classes FGD looks at
LEARN_EVERY = 512  # arrivals
HALF_LIFE = 8_192  # arrivals
LOWEST = np.iinfo(np.int64).min

Score = Callable[[Room, Task], Ints]


def best_fit(room: Room, task: Task) -> Ints:
    """Prefer the machine that keeps least CPU and GPU; ``[N]`` up to 100."""
    cpu = (room.cpu - task.cpu_milli) / CPU_MOST
    gpu = (room.total - task.gpu_milli) / (MILLI * CARDS_MOST)
    return (100 * (1 - 0.5 * cpu - 0.5 * gpu)).astype(np.int64)


def dot_product(room: Room, task: Task) -> Ints:
    """Prefer the machine whose free vector (CPU, GPU) has the smallest product with what is asked; ``[N]`` 0..100."""
    cpu = room.cpu * (task.cpu_milli / CPU_MOST**2)
    gpu = room.total * (task.gpu_milli / (MILLI * CARDS_MOST) ** 2)
    return (100 * (1 - (cpu + gpu) / 2)).astype(np.int64)


def gpu_packing(room: Room, task: Task) -> Ints:
    """Prefer cards in use, then idle cards of machines in use, then idle machines; ``[N]`` 0..100."""
    if not task.gpus:
        return np.zeros(len(room.cpu), np.int64)
    idle_machine = np.maximum(100 // 3 - room.idle, room.idle)
    new_cards = np.maximum(100 // 2 - task.gpus, 100 // 3)
    score = np.where(room.idle == room.count, idle_machine, new_cards)
    if task.milli < MILLI:
        least = np.where(room.cards >= task.milli, room.cards, MILLI + 1).min(axis=0)
        score = np.where(least < MILLI, np.maximum(100 - least * 100 // MILLI // 10, 50), score)
    return np.asarray(score, np.int64)


@dataclass(slots=True)
class GpuClustering:
    """Prefer machines with tasks of the same GPU request alone, then among others, then idle ones."""

    kinds: dict[tuple[int, bool], Ints] = field(default_factory=dict)  # by request: [N] how many run there

    def __call__(self, room: Room, task: Task) -> Ints:
        """Return ``[N]`` 0..100."""
        if not task.gpus:
            return np.zeros(len(room.cpu), np.int64)
        fuller = 25 * (MILLI * CARDS_MOST - room.total) // (MILLI * CARDS_MOST)
        same = self.kinds.get(self.kind(task))
        kinds = sum((there > 0).astype(np.int64) for there in self.kinds.values())
        if same is None:
            return np.asarray(fuller + 25 * (kinds == 0), np.int64)
        return np.asarray(fuller + np.where(same > 0, np.where(kinds == 1, 75, 50), 25 * (kinds == 0)), np.int64)

    @staticmethod
    def kind(task: Task) -> tuple[int, bool]:
        """Return what is clustered: how many GPUs, or a share."""
        return task.gpus, task.milli < MILLI

    def note(self, room: Room, task: Task, at: int) -> None:
        """Remember a placement."""
        if task.gpus:
            self.kinds.setdefault(self.kind(task), np.zeros(len(room.cpu), np.int64))[at] += 1


class Greedy:
    """The machine with the best score, the fullest card that fits; ties by name, or at random."""

    def __init__(self, machines: Sequence[Machine], score: Score, rng: np.random.Generator | None = None) -> None:
        """Begin with an empty cluster; with `rng` ties are broken at random."""
        self.room, self._score, self._rng = Room(machines), score, rng

    def place(self, task: Task) -> Place | None:
        """Place one task."""
        values = np.where(self.room.fits(task), self._score(self.room, task), LOWEST)
        at = int(values.argmax())
        if values[at] == LOWEST:
            return None
        if self._rng is not None:
            at = int(self._rng.choice(np.flatnonzero(values == values[at])))
        cards = self.room.best_cards(task, at)
        self.room.take(task, at, cards)
        if isinstance(self._score, GpuClustering):
            self._score.note(self.room, task, at)
        return at, cards


class Random:
    """Any machine that fits, any card that fits."""

    def __init__(self, machines: Sequence[Machine], rng: np.random.Generator) -> None:
        """Begin with an empty cluster."""
        self.room, self._rng = Room(machines), rng

    def place(self, task: Task) -> Place | None:
        """Place one task."""
        fits = np.flatnonzero(self.room.fits(task))
        if not len(fits):
            return None
        at = int(self._rng.choice(fits))
        cards = self.room.best_cards(task, at)
        if task.gpus and task.milli < MILLI:
            cards = (int(self._rng.choice(np.flatnonzero(self.room.cards[:, at] >= task.milli))),)
        self.room.take(task, at, cards)
        return at, cards


Class = tuple[int, int, int, tuple[str, ...]]  # CPU, milli, GPUs, models


class Typical:
    """The commonest classes of tasks, and how much of a machine's free GPU they could not use.

    Classes that differ in CPU alone are one group with a step per CPU amount.
    """

    def __init__(self, seen: Mapping[Class, float], machines: Sequence[Machine]) -> None:
        """Take the classes that make 95 % of the tasks."""
        ranked, total, kept = sorted(seen.items(), key=lambda each: (-each[1], each[0])), sum(seen.values()), 0.0
        classes: list[tuple[Class, float]] = []
        for known, often in ranked:
            if kept >= TYPICAL * total:
                break
            classes.append((known, often))
            kept += often
        groups = sorted({known[1:] for known, _ in classes if known[1] * known[2]})
        self._steps = np.asarray(sorted({known[0] for known, _ in classes}), np.int64)
        self._often = np.zeros((len(groups), len(self._steps) + 1))  # [G, steps]
        for known, often in classes:
            if known[1] * known[2]:
                step = int(self._steps.searchsorted(known[0])) + 1
                self._often[groups.index(known[1:]), step:] += often / kept
        self._milli = np.asarray([group[0] for group in groups], np.int64)[:, None, None]
        self._count = np.asarray([group[1] for group in groups], np.int64)[:, None]
        models = [[not group[2] or machine.model in group[2] for machine in machines] for group in groups]
        self._models = np.asarray(models, np.bool_).reshape(len(groups), len(machines))

    def before_and_after(self, room: Room, task: Task, rows: Ints) -> tuple[Floats, Floats]:
        """Return the expected fragment now ``[n]``, and with the task ``[n]``, or on each card ``[D, n]`` for a share.

        What does not fit gives some number that nobody reads.
        """
        cards, cpu = room.cards[:, rows], room.cpu[rows]
        useful, count = self._useful(cards)
        before = cards.sum(axis=0) - self._expected(useful, count, cpu, rows)
        left = cpu - task.cpu_milli
        if not task.gpus:
            return before, cards.sum(axis=0) - self._expected(useful, count, left, rows)
        if task.milli == MILLI:
            idle = cards == MILLI
            after = cards * ~(idle & (idle.cumsum(axis=0) <= task.gpus))
            return before, after.sum(axis=0) - self._expected(*self._useful(after), left, rows)
        less = cards - task.milli
        useful = useful[:, None] - cards * (cards >= self._milli) + less * (less >= self._milli)
        count = count[:, None] - (cards >= self._milli) + (less >= self._milli)
        weight = (self._often[:, self._step(left)] * self._models[:, rows])[:, None]
        lost = np.where(count >= self._count[:, :, None], weight * useful, 0).sum(axis=0)
        return before, cards.sum(axis=0) - task.milli - lost

    def fragment(self, room: Room) -> float:
        """Return the expected fragment of the whole cluster, in milli."""
        rows = np.arange(len(room.cpu))
        return float((room.total - self._expected(*self._useful(room.cards), room.cpu, rows)).sum())

    def _step(self, cpu: Ints) -> Ints:
        return np.asarray(self._steps.searchsorted(cpu, side="right"), np.int64)

    def _useful(self, cards: Ints) -> tuple[Ints, Ints]:
        """Return ``[G, n]`` the milli of cards with enough left, and how many they are."""
        enough = cards >= self._milli
        return (cards * enough).sum(axis=1), enough.sum(axis=1)

    def _expected(self, useful: Ints, count: Ints, cpu: Ints, rows: Ints) -> Floats:
        often = self._often[:, self._step(cpu)] * self._models[:, rows]
        return np.asarray((often * (count >= self._count) * useful).sum(axis=0))


def class_of(task: Task) -> Class:
    """Return a task's class: FGD does not look at memory."""
    return task.cpu_milli, task.milli * (task.gpus > 0), task.gpus, task.models


@dataclass(slots=True)
class _Scored:
    """One class on every machine: integer score, card, and up to where changes were taken in."""

    score: Ints
    card: Ints
    upto: int = 0


class Fgd:
    """The steepest descent of the expected fragment, by an integer score; the card with the best one."""

    def __init__(
        self,
        machines: Sequence[Machine],
        oracle: Sequence[Task] | None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """Begin with an empty cluster.

        Args:
            machines: of the cluster.
            oracle: tasks whose classes it knows from the start; None learns them from those that come.
            rng: breaks ties at random; None by name.
        """
        self.room, self._rng, self._learns = Room(machines), rng, oracle is None
        self._seen: dict[Class, float] = dict(Counter(class_of(task) for task in oracle or ()))
        self._since = 0
        self._renew()

    def _renew(self) -> None:
        self._typical = Typical(self._seen, self.room.machines)
        self._scored: dict[Hashable, _Scored] = {}

    def _learn(self, task: Task) -> None:
        self._seen[class_of(task)] = self._seen.get(class_of(task), 0.0) + 1
        self._since += 1
        if self._since % LEARN_EVERY == 0 or self._since in {32, 128}:
            for known in self._seen:
                self._seen[known] *= 0.5 ** (LEARN_EVERY / HALF_LIFE)
            self._renew()

    def place(self, task: Task) -> Place | None:
        """Place one task."""
        if self._learns:
            self._learn(task)
        fits = self.room.fits(task)
        if not fits.any():
            return None
        scored = self._turned(task)
        values = np.where(fits, scored.score, LOWEST)
        at = int(values.argmax())
        if self._rng is not None:
            at = int(self._rng.choice(np.flatnonzero(values == values[at])))
        shared = task.gpus and task.milli < MILLI
        cards = (int(scored.card[at]),) if shared else self.room.best_cards(task, at)
        self.room.take(task, at, cards)
        return at, cards

    def _turned(self, task: Task) -> _Scored:
        """Return the class's scores; only machines that changed since it was last asked are scored anew."""
        room, key = self.room, class_of(task)
        scored = self._scored.get(key)
        if scored is None:
            nothing = np.zeros(len(room.cpu), np.int64)
            scored = self._scored[key] = _Scored(nothing, nothing.copy())
            rows = np.arange(len(room.cpu))
        else:
            rows = np.asarray(list(set(room.changed[scored.upto :])), np.int64)
        scored.upto = len(room.changed)
        if len(rows):
            before, after = self._typical.before_and_after(room, task, rows)
            score = (100 / (1 + np.exp((after - before) / MILLI))).astype(np.int64)
            if score.ndim > 1:
                fits: Bools = room.cards[:, rows] >= task.milli
                score = np.where(fits, score, -1)
                scored.card[rows] = score.argmax(axis=0)
                score = score.max(axis=0)
            scored.score[rows] = score
        return scored
