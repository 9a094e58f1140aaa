"""`bench quality`: how much of the cluster's GPUs each policy allocates, on replays of a trace.

Every policy meets the same arrivals per seed, and an independent book checks every placement. The BestFit loop runs
with every trace and seed: what Tessera's decisions cost is said in parts of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.quality_product import Tessera
from bench.quality_reference import (
    Fgd,
    GpuClustering,
    Greedy,
    Random,
    Typical,
    best_fit,
    class_of,
    dot_product,
    gpu_packing,
)
from bench.quality_replay import ARRIVED, FRAGMENT_AT, Curve, Policy, Room, WrongPlacementError, replay
from bench.trace import Task, Trace, arrivals

Json = dict[str, Any]
Say = Callable[[str], None]

POLICIES = ("tessera", "fgd", "fgd-stock", "bestfit", "packing", "clustering", "dotprod", "random")
MIXES = ("oracle", "online")
MANY_NODES, MANY_TASKS = 10_000, 4_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked.

    Attributes:
        traces: by the name they are listed under.
        policies: of `POLICIES`.
        mix: `oracle` or `online`.
        seeds: of arrivals and of random choices.
        many: also time decisions on 10,000 nodes.
    """

    traces: dict[str, Trace]
    policies: tuple[str, ...]
    mix: str
    seeds: tuple[int, ...]
    many: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy on one trace: a curve per seed."""

    trace: str
    policy: str
    curves: list[Curve]
    fragments: list[float]  # expected fragment at 80 % arrived, in percent of the free GPU


def made(policy: str, trace: Trace, mix: str, seed: int) -> Policy:
    """Return a policy before an empty cluster.

    The reference policies meet the machines in an order of their own per seed: their simulator breaks ties by names
    that differ from run to run, and its spread over seeds shows it.
    """
    oracle = trace.tasks if mix == "oracle" else None
    if policy == "tessera":
        return Tessera(trace.machines, oracle)
    order = np.random.default_rng((seed, 2)).permutation(len(trace.machines)).tolist()
    machines = [trace.machines[index] for index in order]
    rng = np.random.default_rng((seed, 3))
    makers: dict[str, Callable[[], Policy]] = {
        "fgd": lambda: Fgd(machines, oracle),
        "fgd-stock": lambda: Fgd(machines, oracle, rng),
        "bestfit": lambda: Greedy(machines, best_fit),
        "packing": lambda: Greedy(machines, gpu_packing),
        "clustering": lambda: Greedy(machines, GpuClustering()),
        "dotprod": lambda: Greedy(machines, dot_product),
        "random": lambda: Random(machines, rng),
    }
    return Ordered(makers[policy](), order)


@dataclass(frozen=True, slots=True)
class Ordered:
    """A policy that meets the machines in another order than the trace has them."""

    policy: Policy
    order: Sequence[int]

    def place(self, task: Task) -> tuple[int, tuple[int, ...]] | None:
        """Place one task; machines are numbered as in the trace."""
        place = self.policy.place(task)
        return None if place is None else (self.order[place[0]], place[1])


def run_quality(settings: Settings, say: Say) -> Json:
    """Replay everything that was asked and return the report."""
    begun = time.monotonic()
    policies = tuple(dict.fromkeys((*settings.policies, "bestfit")))
    cells = {key: Cell(*key, [], []) for key in product(settings.traces, policies)}
    many: list[float] = []
    report: Json = {"seed": settings.seeds[0], "seeds": list(settings.seeds)}
    report["sources"] = {name: trace.source for name, trace in settings.traces.items()}
    try:
        for (name, trace), seed in product(settings.traces.items(), settings.seeds):
            tasks = arrivals(trace, seed)
            for policy in policies:
                curve = _run(trace, tasks, policy, settings.mix, seed)
                cells[name, policy].curves.append(curve)
                cells[name, policy].fragments.append(_fragment(trace, curve))
                say(f"{name} seed {seed} {policy}: {curve.at(100) or float('nan'):.2f} % at 100 %")
        if settings.many and "tessera" in policies:
            many = _many(next(iter(settings.traces.values())), settings)
    except WrongPlacementError as error:
        return {**report, "ok": False, "error": str(error), "checked": 0, "rows": []}
    shown = [cell for cell in cells.values() if cell.policy in settings.policies]
    ours, bests = ([c for c in cells.values() if c.policy == policy] for policy in ("tessera", "bestfit"))
    return {
        **report,
        "rows": [row for cell in shown for row in _rows(cell, settings.mix)],
        "fragments": [
            {
                "trace": cell.trace,
                "policy": cell.policy,
                "arrived": FRAGMENT_AT,
                "of_free_pct": round(float(np.mean(cell.fragments)), 2),
            }
            for cell in shown
        ],
        "tessera_at_100": _mean_at_100(ours),
        "bestfit_at_100": _mean_at_100(bests),
        "seconds": round(time.monotonic() - begun, 1),
        "ratio_bestfit": round(_seconds(ours) / _seconds(bests), 2) if ours else None,
        "decision_ms_p99": _p99([s for cell in ours for curve in cell.curves for s in curve.seconds.tolist()]),
        "decision_ms_p99_10k": _p99(many),
        "checked": sum(curve.placed for cell in cells.values() for curve in cell.curves),
        "ok": True,
    }


def _run(trace: Trace, tasks: Sequence[Task], policy: str, mix: str, seed: int) -> Curve:
    one = made(policy, trace, mix, seed)
    if isinstance(one, Tessera):
        one.meet(tasks)
    return replay(trace.machines, tasks, one)


def _many(trace: Trace, settings: Settings) -> list[float]:
    """Return the seconds of Tessera's decisions on the same machines again and again, up to 10,000 of them."""
    machines = [
        replace(trace.machines[number % len(trace.machines)], name=f"node-{number:05}") for number in range(MANY_NODES)
    ]
    tasks = arrivals(trace, settings.seeds[0])[:MANY_TASKS]
    curve = _run(Trace(machines, trace.tasks, trace.source), tasks, "tessera", settings.mix, settings.seeds[0])
    return list(curve.seconds.tolist())


def _fragment(trace: Trace, curve: Curve) -> float:
    """Return the expected fragment in percent of the free GPU, by FGD's measure, when 80 % had arrived."""
    room, (cpu, left) = Room(trace.machines), curve.left
    room.cpu[:] = cpu
    for index, cards in enumerate(left):
        room.cards[: len(cards), index] = cards
    room.total = room.cards.sum(axis=0)
    typical = Typical(Counter(class_of(task) for task in trace.tasks), trace.machines)
    return 100 * typical.fragment(room) / max(int(room.total.sum()), 1)


def _rows(cell: Cell, mix: str) -> list[Json]:
    rows = []
    for percent in ARRIVED:
        values = [value for curve in cell.curves if (value := curve.at(percent)) is not None]
        if values:
            mean, std = round(float(np.mean(values)), 3), round(float(np.std(values)), 3)
            one = {"trace": cell.trace, "policy": cell.policy, "mix": mix, "arrived": percent, "mean": mean, "std": std}
            rows.append({**one, "values": [round(value, 3) for value in values]})
    return rows


def _mean_at_100(cells: Sequence[Cell]) -> float | None:
    """Return the mean over traces and seeds of what was allocated when 100 % had been asked for."""
    values = [value for cell in cells for curve in cell.curves if (value := curve.at(100)) is not None]
    return round(float(np.mean(values)), 3) if values else None


def _seconds(cells: Sequence[Cell]) -> float:
    return float(sum(curve.seconds.sum() for cell in cells for curve in cell.curves))


def _p99(seconds: Sequence[float]) -> float | None:
    return round(1000 * float(np.percentile(seconds, 99)), 3) if seconds else None


def show(report: Json) -> None:
    """Print a table for people: the mean of each policy at each point."""
    console = Console(highlight=False)
    points = [f"@{percent}" for percent in ARRIVED]
    table = Table("trace", "policy", *points, "spread", "frag", box=None, padding=(0, 1, 0, 0))
    left = {(one["trace"], one["policy"]): one["of_free_pct"] for one in report["fragments"]}
    for (trace, policy), fragment in left.items():
        found = {row["arrived"]: row for row in report["rows"] if (row["trace"], row["policy"]) == (trace, policy)}
        means = [f"{found[percent]['mean']:.1f}" if percent in found else "" for percent in ARRIVED]
        spread = f"{found[100]['std']:.2f}" if 100 in found else ""
        table.add_row(trace, policy, *means, spread, f"{fragment:.1f}")
    console.print("GPUs allocated, in percent of all, when so many had been asked for (@, in percent of all)")
    console.print(table)
    console.print(
        f"spread: over seeds, @100; frag: free GPU that coming requests could not use, in percent, @{FRAGMENT_AT}"
    )
    for name, source in report["sources"].items():
        console.print(f"{name}: {source}")
