"""`make simulate STEPS=N`: episodes of fresh seeds until so many steps are done; the last line of stdout is the report.

A seed that finds something is written to `tests/seeds/SEED.json`, which a test replays for ever.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from pathlib import Path

from scheduler import logs
from tests.simulation.episode import Report, play

SEEDS = Path(__file__).resolve().parent.parent / "seeds"
SHOWN = 2000
EVERY_S = 10.0


def _play(seed: int) -> Report:
    logs.configure("critical", "auto")
    return play(seed)


def keep(report: Report) -> Path:
    """Write a seed down with what it found."""
    path = SEEDS / f"{report.seed}.json"
    told = {"seed": report.seed, "found": report.violation[:SHOWN]}
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def simulate(steps: int, first: int, jobs: int) -> dict[str, object]:
    """Play until so many steps are done, and return the report."""
    began_s = said_s = time.monotonic()
    done, seeds, totals, points = 0, 0, Counter[str](), Counter[str]()
    found: list[int] = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for report in _reports(pool, first, jobs):
            done, seeds = done + report.steps, seeds + 1
            totals.update({"looks": report.looks, "pods": report.pods, "bound": report.bound})
            points.update(report.points)
            if report.violation:
                found.append(report.seed)
                _say(f"seed {report.seed}: {report.violation[:SHOWN]}; kept as {keep(report)}")
            if time.monotonic() - said_s > EVERY_S:
                said_s = time.monotonic()
                _say(f"{done} of {steps} steps, {seeds} seeds, {len(found)} with a finding")
            if done >= steps:
                break
        pool.shutdown(cancel_futures=True)
    return {
        "steps": done,
        "seeds": seeds,
        "violations": len(found),
        "failed": found,
        **totals,
        "kills": sum(times for point, times in points.items() if point.startswith("killed")),
        "points": dict(sorted(points.items())),
        "seconds": round(time.monotonic() - began_s, 1),
        "seed": first,
        "ok": not found and done >= steps,
    }


def _reports(pool: ProcessPoolExecutor, first: int, jobs: int) -> Iterator[Report]:
    """Yield reports in the order of their seeds, a few seeds ahead of the one that is read."""
    seeds = count(first)
    ahead = [pool.submit(_play, seed) for seed in islice(seeds, 2 * jobs)]
    while True:
        yield ahead.pop(0).result()
        ahead.append(pool.submit(_play, next(seeds)))


def main() -> int:
    """Run as a program; 0 if and only if nothing was found."""
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    report = simulate(asked.steps, asked.seed, asked.jobs)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
