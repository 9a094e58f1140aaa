"""One replay of a trace without a control plane: tasks come one by one, a policy places each or lets it go.

The columns here are the reference policies' own. Beside every policy runs a book in plain Python that shares nothing
with it: a placement that the book has no room for ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.devices import MILLI
from bench.trace import Machine, Task

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Place = tuple[int, tuple[int, ...]]

ARRIVED = (50, 80, 90, 95, 100, 110, 120, 130)
"""Where curves are read, in percent of all GPUs asked for so far."""
FRAGMENT_AT = 80
"""Where fragments are compared: later hardly anything is left that is none."""


class WrongPlacementError(Exception):
    """A policy has placed a task where it does not fit; the sentence says what was too much."""


class Policy(Protocol):
    """Keeps its own picture of the cluster and places one task after the other."""

    def place(self, task: Task) -> Place | None:
        """Return machine (index) and cards of a task, and keep them; None lets the task go."""
        ...


@dataclass(slots=True)
class Book:
    """What every machine has left, kept apart from all policies."""

    machines: Sequence[Machine]
    cpu: list[int] = field(init=False)
    memory: list[int] = field(init=False)
    cards: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        """Everything is free."""
        self.cpu = [machine.cpu_milli for machine in self.machines]
        self.memory = [machine.memory_mib for machine in self.machines]
        self.cards = [[MILLI] * machine.gpus for machine in self.machines]

    def write(self, task: Task, place: Place) -> None:
        """Take a placement down.

        Raises:
            WrongPlacementError: it does not fit.
        """
        at, cards = place
        name = self.machines[at].name
        if len(set(cards)) != task.gpus or len(cards) != task.gpus:
            raise WrongPlacementError(f"{task.name} asks {task.gpus} GPUs and got {cards} of {name}")
        if task.gpus and task.models and self.machines[at].model not in task.models:
            raise WrongPlacementError(f"{task.name} wants {task.models} and got {name}, a {self.machines[at].model}")
        self.cpu[at] -= task.cpu_milli
        self.memory[at] -= task.memory_mib
        if self.cpu[at] < 0 or self.memory[at] < 0:
            raise WrongPlacementError(f"{task.name} takes more CPU or memory than {name} has left")
        for card in cards:
            if not 0 <= card < len(self.cards[at]) or self.cards[at][card] < task.milli:
                raise WrongPlacementError(f"{task.name} takes {task.milli} milli of GPU {card} of {name}: too much")
            self.cards[at][card] -= task.milli


@dataclass(frozen=True, slots=True)
class Curve:
    """What one run did.

    Attributes:
        asked: ``[T]`` milli-GPU asked after each arrival.
        allocated: ``[T]`` milli-GPU allocated after each arrival.
        seconds: ``[T]`` processor time of each decision, its booking included.
        gpu_milli: of all machines.
        placed: tasks that were placed, each of them checked.
        left: CPU of each machine and milli of each of its cards when `FRAGMENT_AT` percent had arrived.
    """

    asked: Ints
    allocated: Ints
    seconds: Floats
    gpu_milli: int
    placed: int
    left: tuple[list[int], list[list[int]]]

    def at(self, percent: int) -> float | None:
        """Return the mean allocated percent of all GPUs over arrivals at this rounded percent; None = never there."""
        here = np.rint(100 * self.asked / self.gpu_milli) == percent
        return float(100 * self.allocated[here].mean() / self.gpu_milli) if here.any() else None


def replay(machines: Sequence[Machine], tasks: Sequence[Task], policy: Policy) -> Curve:
    """Let the tasks come one by one; what is placed stays, what is not is gone.

    Processor time is what counts, so that a busy neighbour does not.

    Raises:
        WrongPlacementError: the policy placed a task where it does not fit.
    """
    book, placed, asked = Book(machines), 0, 0
    gpu_milli = MILLI * sum(machine.gpus for machine in machines)
    left = book.cpu, book.cards
    allocated, seconds = np.zeros(len(tasks), np.int64), np.zeros(len(tasks))
    for number, task in enumerate(tasks):
        begun = time.thread_time()
        place = policy.place(task)
        seconds[number] = time.thread_time() - begun
        if place is not None:
            book.write(task, place)
            placed += 1
            allocated[number] = task.gpu_milli
        before, asked = asked, asked + task.gpu_milli
        if before < FRAGMENT_AT * gpu_milli // 100 <= asked:
            left = list(book.cpu), [list(cards) for cards in book.cards]
    arrived = np.cumsum([task.gpu_milli for task in tasks], dtype=np.int64)
    return Curve(arrived, allocated.cumsum(), seconds, gpu_milli, placed, left)


@dataclass(slots=True)
class Room:
    """What the machines have left, in columns; N machines in the order of their names' list, D cards at most."""

    machines: Sequence[Machine]
    cpu: Ints = field(init=False)  # [N] milli
    memory: Ints = field(init=False)  # [N] MiB
    cards: Ints = field(init=False)  # [D, N] milli; 0 where there is no card
    idle: Ints = field(init=False)  # [N] cards of which nothing is taken
    most: Ints = field(init=False)  # [N] milli of the emptiest card
    total: Ints = field(init=False)  # [N] milli
    count: Ints = field(init=False)  # [N] cards
    changed: list[int] = field(default_factory=list)  # machines, in the order of the placements
    _models: dict[tuple[str, ...], Bools] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Everything is free."""
        self.cpu = np.asarray([machine.cpu_milli for machine in self.machines], np.int64)
        self.memory = np.asarray([machine.memory_mib for machine in self.machines], np.int64)
        self.count = np.asarray([machine.gpus for machine in self.machines], np.int64)
        self.cards = MILLI * (np.arange(self.count.max(initial=1))[:, None] < self.count).astype(np.int64)
        self.idle, self.total = self.count.copy(), MILLI * self.count
        self.most = self.cards.max(axis=0)

    def models(self, wanted: tuple[str, ...]) -> Bools:
        """Return ``[N]`` machines of these models; all without a wish."""
        known = self._models.get(wanted)
        if known is None:
            allowed = [not wanted or machine.model in wanted for machine in self.machines]
            known = self._models[wanted] = np.asarray(allowed, np.bool_)
        return known

    def fits(self, task: Task) -> Bools:
        """Return ``[N]`` machines that can take a task now."""
        fits = (self.cpu >= task.cpu_milli) & (self.memory >= task.memory_mib)
        if task.gpus:
            fits &= self.idle >= task.gpus if task.milli == MILLI else self.most >= task.milli
            if task.models:
                fits &= self.models(task.models)
        return fits

    def best_cards(self, task: Task, at: int) -> tuple[int, ...]:
        """Return the first idle cards for whole GPUs, the fullest card with room for a share."""
        here = self.cards[:, at]
        if task.milli == MILLI or not task.gpus:
            return tuple(np.flatnonzero(here == MILLI)[: task.gpus].tolist())
        return (int(np.where(here >= task.milli, here, MILLI + 1).argmin()),)

    def take(self, task: Task, at: int, cards: tuple[int, ...]) -> None:
        """Book a placement that fits."""
        self.cpu[at] -= task.cpu_milli
        self.memory[at] -= task.memory_mib
        self.changed.append(at)
        if cards:
            self.cards[list(cards), at] -= task.milli
            here = self.cards[:, at]
            self.idle[at] = np.count_nonzero(here == MILLI)
            self.most[at] = here.max()
            self.total[at] -= task.gpu_milli
