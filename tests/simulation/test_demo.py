"""The demo as a user starts it: the same journal whatever the hash seed, and exit 0 only when all is well."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time

import orjson
import pytest
from rich.console import Console
from typer.testing import CliRunner

from scheduler.cli.demo import Options, Stage
from scheduler.cli.main import app
from scheduler.cli.picture import Picture
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.store.store import Store

ARGUMENTS = ("demo", "--headless", "--json", "--seed", "7", "--duration", "60", "--nodes", "12")
KEYS = (
    "pods bound waiting over_allocations slice_overlaps drift journal_ok allocated_ratio journal_digest seed ok lost"
).split()


def test_the_hash_seed_changes_nothing() -> None:
    reports = []
    for hash_seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "scheduler", *ARGUMENTS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        reports.append(orjson.loads(done.stdout.splitlines()[-1]))
    first, second = reports
    assert first == second
    assert set(KEYS) <= first.keys()
    assert first["ok"]
    assert first["pods"] >= 60
    assert first["bound"] >= 40
    assert first["over_allocations"] == first["slice_overlaps"] == first["drift"] == first["lost"] == 0
    assert first["allocated_ratio"] > 0.8


def test_another_seed_is_another_run() -> None:
    runner = CliRunner()
    arguments = [*ARGUMENTS[:4], "8", "--duration", "5", "--nodes", "2"]
    eight, nine = (runner.invoke(app, [*arguments[:4], seed, *arguments[5:]]) for seed in ("8", "9"))
    assert (eight.exit_code, nine.exit_code) == (0, 0)
    digests = [orjson.loads(one.stdout.splitlines()[-1])["journal_digest"] for one in (eight, nine)]
    assert digests[0] != digests[1]


def test_without_a_terminal_it_runs_headless_and_ends_with_a_summary() -> None:
    done = CliRunner().invoke(app, ["demo", "--duration", "5", "--nodes", "2"])
    assert done.exit_code == 0
    assert "all is well" in done.stdout
    assert "Next:" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("width", "height", "encoding"), [(120, 40, "utf-8"), (80, 24, "utf-8"), (80, 24, "ascii")])
def test_the_picture_fits_its_terminal(width: int, height: int, encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, height=height, file=out, force_terminal=True)

    async def play() -> None:
        store = Store.open("sqlite://")
        options = Options(headless=False, json=False, seed=7, duration_s=None, nodes=64, keep=False)
        stage = Stage(options, LoopClock(asyncio.get_running_loop()), store)
        async with stage.world.running():
            await stage.app.start()
            await stage.play(30, None)
            picture = Picture(stage.app, stage.chronicle, console, stage.pools())
            lines = console.render_lines(picture.frame(), pad=False)
            texts = ["".join(segment.text for segment in line) for line in lines]
            assert len(texts) <= height
            assert max(map(len, texts)) <= width
            assert any("over-allocations 0" in text for text in texts)
            cells = [cell for _, names in stage.pools() for name in names for cell in picture.cells(name)]
            assert len(cells) == 512
            assert cells.count("used") > 20
            for text in texts:
                text.encode(encoding)
            await stage.app.stop()
        store.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play())


def test_a_paced_loop_takes_its_time() -> None:
    began = time.monotonic()
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(speed=100.0)) as runner:
        runner.run(_rest(runner, 20.0))
    assert 0.2 <= time.monotonic() - began < 5.0


async def _rest(runner: asyncio.Runner, seconds: float) -> None:
    await LoopClock(runner.get_loop()).sleep(seconds)
