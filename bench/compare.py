"""`bench compare A B`: what B's policies allocate more or less than A's, by trace and arrived GPUs.

Arms are paired by seed, so that what all seeds share does not count as spread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]
Key = tuple[str, str, str, int]


class CompareError(Exception):
    """The two reports cannot be compared; the sentence says why."""


def read_report(path: Path) -> Json:
    """Return a JSON report of `bench quality`: the last line of the file that is an object.

    Raises:
        CompareError: there is none.
    """
    try:
        for line in reversed(path.read_text().splitlines()):
            if line.startswith("{"):
                report: Json = json.loads(line)
                report["rows"][0]["values"]
                return report
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CompareError(f"{path}: is no report of `bench quality --json`: {error!r}") from error
    raise CompareError(f"{path}: is no report of `bench quality --json`")


def compare(one: Json, other: Json) -> Json:
    """Return the regret of the first report against the second, row by row.

    A policy is compared with itself where both have it; reports of one policy each are compared with each other.

    Raises:
        CompareError: they have no trace and policy in common, or other seeds.
    """
    if one.get("seeds") != other.get("seeds"):
        raise CompareError(f"the reports are of seeds {one.get('seeds')} and {other.get('seeds')}; run the same ones")
    ours, theirs = _by_key(one), _by_key(other)
    alone = [{policy for _, policy, _, _ in rows} for rows in (ours, theirs)]
    if all(len(policies) == 1 for policies in alone):
        name = next(iter(alone[0]))
        theirs = {(trace, name, mix, arrived): row for (trace, _, mix, arrived), row in theirs.items()}
    rows = []
    for key in ours.keys() & theirs.keys():
        gained = np.asarray(theirs[key]["values"]) - np.asarray(ours[key]["values"])
        same = {name: ours[key][name] for name in ("trace", "mix", "arrived")}
        names = {"a": ours[key]["policy"], "b": theirs[key]["policy"]}
        means = {"a_mean": ours[key]["mean"], "b_mean": theirs[key]["mean"]}
        rows.append({**same, **names, **means, "regret": round(float(gained.mean()), 3), "std": _std(gained)})
    if not rows:
        raise CompareError("the reports have no trace, policy and mix in common")
    rows.sort(key=lambda row: (row["trace"], row["a"], row["arrived"]))
    worst = max(float(row["regret"]) for row in rows)
    return {"rows": rows, "worst_regret": worst, "checked": len(rows), "seed": one["seed"], "ok": True}


def _by_key(report: Json) -> dict[Key, Json]:
    policies = {row["policy"] for row in report["rows"]}
    mixes = {row["mix"] for row in report["rows"]}
    if len(policies) == len(mixes) == 1:  # an oracle's run may be held against one that learns
        return {(row["trace"], row["policy"], "", row["arrived"]): row for row in report["rows"]}
    return {(row["trace"], row["policy"], row["mix"], row["arrived"]): row for row in report["rows"]}


def _std(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return round(float(values.std()), 3)


def show(report: Json) -> None:
    """Print the table for people."""
    table = Table("trace", "arrived", "A", "B", "A mean", "B mean", "A's regret", "std")
    for row in report["rows"]:
        figures = [f"{row[key]:.2f}" for key in ("a_mean", "b_mean", "regret", "std")]
        table.add_row(row["trace"], str(row["arrived"]), row["a"], row["b"], *figures)
    Console().print(table)
