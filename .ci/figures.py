"""Compare the figures of one or more runs with what they must be.

    figures.py FILE... -- 'bound >= 500' 'journal_ok == true' 'same journal_digest' 'within latency'

`within NAME` holds every figure of that bench against bench/budgets.toml.

Each FILE ends with one JSON object on its last line. Exit 0 if and only if every demand holds in every file.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.check import BUDGETS, read_budgets

HOLDS: dict[str, Callable[[Any, Any], bool]] = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}


def failure(demand: str, runs: dict[str, dict[str, object]]) -> str:
    """Return why a demand does not hold, or an empty string."""
    if demand.startswith("within "):
        return _beyond(demand.removeprefix("within "), runs)
    if demand.startswith("same "):
        values = {name: run.get(demand.removeprefix("same ")) for name, run in runs.items()}
        return "" if None not in values.values() and len(set(values.values())) == 1 else str(values)
    key, sign, wanted = demand.split()
    values = {name: run.get(key) for name, run in runs.items()}
    bad = {name: v for name, v in values.items() if v is None or not HOLDS[sign](v, json.loads(wanted))}
    return str(bad) if bad else ""


def _beyond(bench: str, runs: dict[str, dict[str, object]]) -> str:
    """Return the figures out of budget, with their bounds."""
    budget = {one.name: one for one in read_budgets(BUDGETS.read_text())}[bench]
    found = [
        f"{figure.key} {run.get(figure.key)}, not {figure.side} {figure.bound}"
        for run in runs.values()
        for figure in budget.figures
        if not figure.holds(run.get(figure.key))
    ]
    return "; ".join(found)


def main(arguments: list[str]) -> int:
    """Check the demands after `--` in the files before it."""
    split = arguments.index("--")
    runs = {name: json.loads(Path(name).read_text().splitlines()[-1]) for name in arguments[:split]}
    failed = 0
    for demand in arguments[split + 1 :]:
        why = failure(demand, runs)
        failed += bool(why)
        sys.stdout.write(f"{'FAILED' if why else 'ok':6} {demand} {why}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
