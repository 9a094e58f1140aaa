"""Compare the figures of one or more runs with what they must be.

    figures.py FILE... -- 'bound >= 500' 'journal_ok == true' 'same journal_digest'

Each FILE ends with one JSON object on its last line. Exit 0 if and only if every demand holds in every file.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOLDS: dict[str, Callable[[Any, Any], bool]] = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}


def failure(demand: str, runs: dict[str, dict[str, object]]) -> str:
    """Return why a demand does not hold, or an empty string."""
    if demand.startswith("same "):
        values = {name: run.get(demand.removeprefix("same ")) for name, run in runs.items()}
        return "" if None not in values.values() and len(set(values.values())) == 1 else str(values)
    key, sign, wanted = demand.split()
    values = {name: run.get(key) for name, run in runs.items()}
    bad = {name: v for name, v in values.items() if v is None or not HOLDS[sign](v, json.loads(wanted))}
    return str(bad) if bad else ""


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
