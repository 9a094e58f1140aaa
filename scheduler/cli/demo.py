"""`tessera demo`: the real Tessera on a cluster in memory, watched on a terminal or counted without one.

Both ways run the very same program in virtual time; on a terminal the loop is paced at 60 virtual seconds a second.
One seed draws everything, so the journal of a run is the same on every machine.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import orjson
import typer
from rich.console import Console
from rich.live import Live

from scheduler import GPU, PREFIX, logs
from scheduler.app import App
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.config import Settings
from scheduler.embedded import audit
from scheduler.embedded.script import BREAKS_AT, Script, machines
from scheduler.embedded.witness import Witness
from scheduler.embedded.world import World
from scheduler.ids import seeded_ids
from scheduler.kube.port import Object
from scheduler.store.store import Store
from scheduler.store.writer import InlineWriter

from .chronicle import Chronicle
from .picture import Picture

SPEED = 60.0
HEADLESS_S, PICTURE_S = 600.0, 20.0
SETTLE_S = 10.0
FRAME_S = SPEED / 8
PROGRESS_S = 60.0
NOTE_S = 240.0
MODE = PREFIX + "mode"
NEXT = (
    ("{tessera} demo --seed 8", "another run"),
    ("{tessera} demo --headless --json", "a run as one line of JSON"),
    ("{tessera} serve --kubeconfig FILE", "beside a kube-scheduler of your own"),
    ("make test", "every test that needs nothing else"),
    ("make e2e", "the tests on a real control plane"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `demo`.

    Attributes:
        duration_s: virtual seconds without a terminal, seconds of the picture on one; None = 600 and 20.
        keep: go on after the script until Ctrl-C.
    """

    headless: bool
    json: bool
    seed: int
    duration_s: float | None
    nodes: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to; `bound` counts Requests that were ever bound, `waiting` pods at the end.

    Attributes:
        lost: submitted pods that the ledger does not know.
        drift: differences between pods and ledger at the end.
        allocated_ratio: GPUs of bound pods / GPUs, at the end, 0..1.
        journal_digest: hash of the journal's last line.
    """

    seed: int
    pods: int
    bound: int
    waiting: int
    lost: int
    over_allocations: int
    slice_overlaps: int
    unannotated: int
    drift: int
    journal_ok: bool
    journal_rows: int
    allocated_ratio: float
    mean_wait_s: float
    journal_digest: str
    ok: bool


def run(options: Options) -> None:
    """Play, print what it came to, and leave with 0 if all is well, 1 if not. Raises typer.Exit."""
    console = Console()
    watched = console.is_terminal and not options.headless and not options.json
    logs.configure("error", "auto")
    paced = watched or options.keep
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(speed=SPEED if paced else 0.0)) as runner:
        report = runner.run(_play(options, console if watched else None))
    if options.json:
        sys.stdout.write(orjson.dumps(asdict(report)).decode() + "\n")
    else:
        _summary(console, report)
    raise typer.Exit(0 if report.ok else 1)


async def _play(options: Options, console: Console | None) -> Report:
    store = Store.open("sqlite://", new_id=seeded_ids(_rng(options, "store")))
    try:
        stage = Stage(options, LoopClock(asyncio.get_running_loop()), store)
        seconds = options.duration_s or (PICTURE_S if console else HEADLESS_S)
        async with stage.world.running():
            await stage.app.start()
            watching = asyncio.create_task(stage.witness.run())
            await stage.play(seconds * SPEED if console else seconds, console)
            await stage.clock.sleep(SETTLE_S)  # what is in flight ends
            watching.cancel()
            report = await stage.report()
            await stage.app.stop()
        return report
    finally:
        store.close()


def _rng(options: Options, part: str) -> Random:
    """Return a source of chance for one part, so that one part's draws do not change another's."""
    return Random(f"{options.seed}.{part}")  # noqa: S311 - repeatable on purpose


class Stage:
    """Everything of one run: the cluster, Tessera, the script, and those who keep count."""

    def __init__(self, options: Options, clock: LoopClock, store: Store) -> None:
        """Build it; nothing runs yet."""
        self.options, self.clock, self.store = options, clock, store
        self.world = World(clock, seeded_ids(_rng(options, "cluster")), _rng(options, "kube-scheduler"))
        self.nodes = machines(options.nodes)
        self.world.cluster.preload("nodes", self.nodes)
        self.app = App(Settings(), clock, self.world.cluster, store, InlineWriter(store), _rng(options, "tessera"))
        self.world.extender = self.app.extender
        people = _rng(options, "people")
        self.script = Script(self.world.cluster, clock, people, seeded_ids(_rng(options, "jobs")))
        self.witness = Witness(self.world.cluster, clock)
        self.chronicle = Chronicle()

    async def play(self, seconds: float, console: Console | None) -> None:
        """Play the script for so many virtual seconds, and on after it where it shall keep; Ctrl-C ends it early."""
        tasks = [
            asyncio.create_task(self._script(seconds)),
            asyncio.create_task(self._depart()),
            asyncio.create_task(self._draw(console) if console else self._progress()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except asyncio.CancelledError:  # Ctrl-C: what was played so far still counts
            task_here = asyncio.current_task()
            assert task_here is not None
            task_here.uncancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def report(self) -> Report:
        """Count, when nothing is in flight any more."""
        self._read()
        seen, verified = self.witness, self.store.verify()
        lost = sum(self.store.row(uid) is None for uid in self.script.submitted)
        nodes, pods = self.world.cluster.snapshot("nodes"), self.world.cluster.snapshot("pods")
        over = len(seen.over_allocations) + len(audit.look(nodes, pods))
        drift = len(await self.app.audit.look())
        total = sum(int(node["status"]["allocatable"][GPU]) for node in seen.nodes.values())
        clean = not (over or seen.slice_overlaps or seen.unannotated or drift or lost)
        return Report(
            seed=self.options.seed,
            pods=len(self.script.submitted),
            bound=len(self.chronicle.bound),
            waiting=len(seen.waiting()),
            lost=lost,
            over_allocations=over,
            slice_overlaps=len(seen.slice_overlaps),
            unannotated=len(seen.unannotated),
            drift=drift,
            journal_ok=verified.ok,
            journal_rows=verified.rows,
            allocated_ratio=round(sum(map(_gpus, seen.bound())) / max(total, 1), 4),
            mean_wait_s=round(self.chronicle.mean_wait_s(), 2),
            journal_digest=verified.head,
            ok=clean and verified.ok,
        )

    # inside

    async def _script(self, seconds: float) -> None:
        trouble = asyncio.create_task(self.script.breakdown(BREAKS_AT * seconds))
        try:
            await self.script.arrivals(seconds)
            while self.options.keep:
                await self.script.arrivals(seconds)
        finally:
            trouble.cancel()

    async def _depart(self) -> None:
        """Let pods that have ended, or are no longer wanted, go: once a second."""
        while True:
            await self.clock.sleep(1.0)
            await self.script.departures(list(self.witness.pods.values()))

    def _read(self) -> None:
        self.chronicle.read(self.store.journal(self.chronicle.lines + 1))

    async def _progress(self) -> None:
        while True:
            await self.clock.sleep(PROGRESS_S)
            self._read()
            seen = self.chronicle
            sys.stderr.write(
                f"{self.clock.monotonic():6.0f} s  {len(self.script.submitted)} pods, {len(seen.bound)} bound, "
                f"{len(self.app.turner.waiting)} waiting, {seen.lines} journal rows\n"
            )

    async def _draw(self, console: Console) -> None:
        picture = Picture(self.app, self.chronicle, console, self.pools())
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                at_s, note = self.script.notes[-1] if self.script.notes else (-NOTE_S, "")
                picture.note = note if self.clock.monotonic() - at_s < NOTE_S else ""
                picture.over = len(self.witness.over_allocations)
                self._read()
                live.update(picture.frame(), refresh=True)
                await self.clock.sleep(FRAME_S)

    def pools(self) -> list[tuple[str, list[str]]]:
        """Return the parts of the grid: title and node names."""
        pools: dict[str, list[str]] = {}
        for node in self.nodes:
            labels = node["metadata"]["labels"]
            title = f"{labels['nvidia.com/gpu.product']}  {labels[MODE]}"
            pools.setdefault(title, []).append(node["metadata"]["name"])
        return list(pools.items())


def _gpus(pod: Object) -> int:
    containers = pod["spec"]["containers"]
    return sum(int(one.get("resources", {}).get("limits", {}).get(GPU, 0)) for one in containers)


def _summary(console: Console, report: Report) -> None:
    verdict = "all is well" if report.ok else "SOMETHING IS WRONG"
    console.print(
        f"[bold]Tessera[/]: {verdict}: {report.pods} pods sent, {report.bound} bound, {report.waiting} waiting, "
        f"{report.pods - report.bound - report.waiting} withdrawn",
        soft_wrap=True,
    )
    console.print(
        f"  {report.allocated_ratio:.0%} of GPUs allocated, mean wait {report.mean_wait_s} s, lost {report.lost}, "
        f"over-allocations {report.over_allocations}, drift {report.drift}",
        soft_wrap=True,
    )
    sound = "verified" if report.journal_ok else "BROKEN"
    console.print(
        f"  journal of {report.journal_rows} rows {sound}, head {report.journal_digest[:16]}, seed {report.seed}"
    )
    console.print("Next:")
    tessera = _command()
    for command, what in NEXT:
        console.print(f"  [cyan]{command.format(tessera=tessera):<43}[/]{what}", soft_wrap=True)


def _command() -> str:
    """Return what to type for this very program, which is seldom on the PATH of a checkout."""
    beside = Path(sys.executable).with_name("tessera")
    if shutil.which("tessera") == str(beside):
        return "tessera"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
