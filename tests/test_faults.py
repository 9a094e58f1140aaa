"""A process that is told to dies at the point and the passing it was told, and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from scheduler import faults
from scheduler.errors import ConfigError
from tests.test_tidy import ROOT, fault_points

PASSES = """
import asyncio, sys
from scheduler import faults

async def main():
    faults.install(faults.deadly(sys.argv[1]))
    for count in range(1, 5):
        await faults.fault("turn.commit.before")
        await faults.fault("turn.commit.after")
        print(count, flush=True)

asyncio.run(main())
"""


def test_every_point_of_the_source_can_be_armed() -> None:
    names = {call.args[0].value for _, call in fault_points() if isinstance(call.args[0], ast.Constant)}
    assert names == faults.POINTS


@pytest.mark.parametrize(("written", "passed"), [("kill:turn.commit.after:1", 0), ("kill:turn.commit.after:3", 2)])
def test_it_dies_by_sigkill_at_that_passing(written: str, passed: int) -> None:
    ran = subprocess.run([sys.executable, "-c", PASSES, written], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, len(ran.stdout.split())) == (-9, passed)


def test_a_point_that_is_not_passed_kills_nobody() -> None:
    argv = [sys.executable, "-c", PASSES, "kill:bind.post.after:1"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, len(ran.stdout.split())) == (0, 4)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("kill:turn.commit.after", "kill:POINT:N"),
        ("kill:turn.commit.after:0", "kill:POINT:N"),
        ("kill:turn.commit.after:-1", "kill:POINT:N"),
        ("stall:turn.commit.after:1", "kill:POINT:N"),
        ("kill:turn.after:1", "no point 'turn.after'; there are .*turn.commit.after"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(written: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        faults.deadly(written)
