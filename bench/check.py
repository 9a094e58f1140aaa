"""`bench check`: run benches and hold their figures against `bench/budgets.toml`.

Invariant: a figure without a value, a bench that ends badly and a budget that cannot be read never pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
Run = Callable[[str], Json]

BUDGETS = Path(__file__).parent / "budgets.toml"
ROOT = Path(__file__).parents[1]
RUN_S = 1800


class BudgetError(ValueError):
    """The budgets cannot be read; the sentence says what to correct."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure's budget: a bound, and on which side of it the figure must be.

    Attributes:
        key: in the bench's report.
        bound: the last value in budget.
        side: `<=`, `>=` or `==`.
        mean: what a quiet machine shows; None for `==`.
    """

    key: str
    bound: object
    side: str
    mean: float | None = None

    def holds(self, value: object) -> bool:
        """Say whether a value is in budget; no value never is."""
        if self.side == "==":
            return type(value) is type(self.bound) and value == self.bound
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(self.bound, int | float):
            return False
        return value <= self.bound if self.side == "<=" else value >= self.bound


@dataclass(frozen=True, slots=True)
class Budget:
    """One bench and its figures; `quick` ones run without being asked for."""

    name: str
    command: str
    quick: bool
    figures: tuple[Figure, ...]


def read_budgets(text: str) -> list[Budget]:
    """Return what a budgets file says.

    Raises:
        BudgetError: it is no TOML, or a bench or figure lacks something.
    """
    try:
        tables = tomllib.loads(text)
        return [
            Budget(name, table["command"], table["quick"], tuple(_figure(*pair) for pair in table["figures"].items()))
            for name, table in tables.items()
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BudgetError(f"the budgets cannot be read: {error!r}") from error


def _figure(key: str, said: Json) -> Figure:
    if "exactly" in said:
        return Figure(key, said["exactly"], "==")
    mean, slack = said["mean"], said["spread"] + said["margin"]
    if said["spread"] < 0 or said["margin"] < 0:
        raise BudgetError(f"{key}: spread and margin are not negative")
    if said.get("low", False) == said.get("high", False):
        raise BudgetError(f"{key}: say `low = true` or `high = true`")
    if said.get("low"):
        return Figure(key, min(mean + slack, said.get("most", mean + slack)), "<=", mean)
    return Figure(key, max(mean - slack, said.get("least", mean - slack)), ">=", mean)


def run_bench(command: str) -> Json:
    """Run one bench as an operator would and return its report; a bench that says nothing has an empty one."""
    argv = [sys.executable, "-m", "bench", *command.split()]
    try:
        ran = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=RUN_S)
        report: Json = json.loads(ran.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError):
        return {}
    return report


def check(budgets: Sequence[Budget], run: Run = run_bench) -> Json:
    """Run these benches one after the other, print the table and return the report.

    Args:
        budgets: at least one.
        run: takes a bench's arguments and returns its report.
    """
    table = Table("bench", "figure", "value", "budget", "quiet machine", "")
    missed = []
    for budget in budgets:
        report = run(budget.command)
        for figure in budget.figures:
            value = report.get(figure.key)
            good = figure.holds(value)
            missed += [] if good else [f"{budget.name}.{figure.key}"]
            mean = "" if figure.mean is None else f"{figure.mean:g}"
            mark = "" if good else "over budget"
            table.add_row(budget.name, figure.key, json.dumps(value), f"{figure.side} {figure.bound}", mean, mark)
    Console(stderr=True).print(table)
    return {
        "benches": len(budgets),
        "checked": sum(len(budget.figures) for budget in budgets),
        "missed": missed,
        "seed": None,
        "ok": bool(budgets) and not missed,
    }
