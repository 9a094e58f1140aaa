"""kill -9 at any moment: whatever was acknowledged is there, whole, and the chain goes on."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

from scheduler.model.reservation import State
from scheduler.store.store import Store
from tests.store.victim import write

ROOT = Path(__file__).parents[2]
ORDER = [State.QUEUED, State.RESERVED, State.BINDING, State.BOUND]
ROUNDS = 20


def _run(url: str, prefix: str, out: int) -> None:
    asyncio.run(write(url, prefix, out))


def acknowledged_before_a_kill(url: str, prefix: str, lines: int) -> dict[str, State]:
    """Start a writing process, kill -9 it after so many acknowledgements, and return how far each Request came."""
    reader, out = os.pipe()
    victim = multiprocessing.get_context("fork").Process(target=_run, args=(url, prefix, out))
    victim.start()
    os.close(out)
    reached: dict[str, State] = {}
    with os.fdopen(reader) as told:
        for number, line in enumerate(told, start=1):
            if line.endswith("\n"):
                name, state = json.loads(line)
                reached[name] = State(state)
            if number == lines:
                victim.kill()
    victim.join()
    assert victim.exitcode == -9
    return reached


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    url, rng = f"sqlite:///{tmp_path}/ledger.db", random.Random(9)
    reached: dict[str, State] = {}
    for number in range(ROUNDS):
        reached |= acknowledged_before_a_kill(url, f"round{number}", rng.randrange(1, 400))
        with Store.open(url) as store:
            found = store.verify_tail()
            assert (found.ok, found.text) == (True, "")
            rows, _ = store.load()
        behind = {name for name, state in reached.items() if ORDER.index(rows[name].state) < ORDER.index(state)}
        assert not behind
    with Store.open(url) as store:
        assert store.verify().ok
        assert store.fence == 2 * ROUNDS + 1
    assert len(reached) > ROUNDS


def test_a_second_process_is_refused_with_a_sentence(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with Store.open(url):
        second = subprocess.run(
            [sys.executable, "-m", "tests.store.victim", url],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("Another Tessera already works on")
