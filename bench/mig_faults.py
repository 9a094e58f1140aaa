"""`bench mig-faults`: what becomes of a MIG change when the driver fails or the process dies anywhere in it.

Every call of the driver fails once, for good, after a hang, or with its work done; and the process dies at every call
and at every write of its journal, with and without a restart of the machine.

The driver is the make-believe one, the process that dies is a real child. After each death or failure a report is taken
as a new agent would, then the new agent recovers. Invariant: a fault that was planned and did not strike is a finding,
not a case.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.errors import BenchError
from bench.fakenvml.box import MODELS, Box, build, geometry, load
from nodeagent.collect import Collector
from nodeagent.journal import CREATE, DESTROY, MODE_OFF, MODE_ON, Change, Journal, JournalError
from nodeagent.mig import Divider, Outcome, Place, Result
from nodeagent.nvml import Nvml

Json = dict[str, Any]
File = Any  # as os.fsync has it
Say = Callable[[str], None]
Layout = tuple[str, bool, frozenset[tuple[str, int | None, bool]]]
"""MIG mode, whether another one is pending, and of each instance profile, start and whether it can be used."""

CARD = Box.uuid(0)
OFF: Layout = "off", False, frozenset()
ON: Layout = "on", False, frozenset()
UNKNOWN, LOST, FORGOTTEN, HANG_MS = 999, 15, 1, 2
WORKS = {
    "nvmlDeviceCreateGpuInstanceWithPlacement": (2, 3, 4, 10, 16, 19, 23),
    "nvmlGpuInstanceCreateComputeInstance": (2, 3, 4, 10, 16, 19, 23),
    "nvmlComputeInstanceDestroy": (2, 4, 6, 10, 16, 19),
    "nvmlGpuInstanceDestroy": (2, 4, 6, 10, 16, 19),
    "nvmlDeviceSetMigMode": (2, 3, 4, 10, 16, 19),
}
"""Functions that change something, and what else they are known to answer; any call may answer the three above."""
LOOK = "report"
MEMORY = Path("/dev/shm")  # noqa: S108 - what a dead process wrote is there; a disk would only be slower
DEATH = -signal.SIGKILL
_FINDINGS_MAX = 20


class MigFaultsError(BenchError):
    """The run could not be finished; the sentence says why."""


def models_of(family: str) -> tuple[str, ...]:
    """Return the GPU keys of a family of the geometry, or the key itself.

    Raises:
        ValueError: it names none that can be played; the sentence names those that can.
    """
    table = geometry()
    found = tuple(key for key in MODELS if family in {key, table["gpus"][key]["family"]})
    if not found:
        names = [*dict.fromkeys(table["gpus"][key]["family"] for key in MODELS), *MODELS]
        raise ValueError(f"--family is one of {', '.join(names)}; not {family}.")
    return found


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong: at the call-th call of the driver, or the write-th of the journal.

    Attributes:
        what: in a few words, with the function.
        call: 1 = the first call; 0 = none.
        code: what the driver answers; 0 = as usual.
        times: calls that fail.
        hang_ms: how long it takes to answer.
        die: the process is killed there.
        late: the call does its work first.
        write: 1 = the first write of the journal that dies; 0 = none.
        reboot: the machine is started again before the new process.
    """

    what: str
    call: int = 0
    code: int = 0
    times: int = 1
    hang_ms: int = 0
    die: bool = False
    late: bool = False
    write: int = 0
    reboot: bool = False


@dataclass(frozen=True, slots=True)
class Deed:
    """What is disturbed: from which state, by what, and which layouts a ready device may then have."""

    name: str
    prepare: Callable[[], None]
    act: Callable[[Divider], list[Result]]
    wish: Sequence[Place]
    ends: tuple[Layout, Layout]


@dataclass(slots=True)
class Row:
    """The counts of one deed."""

    model: str
    change: str
    calls: int = 0
    writes: int = 0
    cases: int = 0
    checked: int = 0
    mixed_ready: int = 0
    unrecovered: int = 0
    missed: int = 0
    findings: list[str] = field(default_factory=list)


def run_mig_faults(family: str, say: Say) -> Json:
    """Run all cases of a family and return the report.

    Raises:
        ValueError: as `models_of`.
        MigFaultsError: there is no C compiler, or an undisturbed change does not work.
    """
    models = models_of(family)
    if not (shutil.which("gcc") or shutil.which("cc")):
        raise MigFaultsError("no C compiler is on the PATH (on Debian, as root: apt-get install build-essential).")
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="tessera-mig-") as built,
        tempfile.TemporaryDirectory(prefix="tessera-mig-", dir=MEMORY if MEMORY.is_dir() else None) as temporary,
    ):
        library = load(build(Path(built)))  # the driver's bindings find a library that is loaded already
        for model in models:
            bench = _Bench(model, Box(library, Path(temporary)).add(model, 1), Path(temporary))
            for deed in bench.deeds():
                rows.append(bench.run(deed))
                say(f"{model} {deed.name}: {rows[-1].cases} cases of {rows[-1].calls} calls, "
                    f"{rows[-1].mixed_ready} mixed ready, {rows[-1].unrecovered} unrecovered")  # fmt: skip
            bench.close()
    return report_of(rows, family)


def report_of(rows: Sequence[Row], family: str) -> Json:
    """Return the bench's keys."""
    total = {key: sum(getattr(row, key) for row in rows) for key in ("cases", "mixed_ready", "unrecovered", "checked")}
    missed = sum(row.missed for row in rows)
    findings = [f"{row.model} {row.change}: {text}" for row in rows for text in row.findings]
    return {
        "family": family,
        "rows": [
            {key: getattr(row, key) for key in ("model", "change", "calls", "cases", "mixed_ready", "unrecovered")}
            for row in rows
        ],
        **total,
        "missed": missed,
        "findings": findings[:_FINDINGS_MAX],
        "seed": None,
        "ok": total["checked"] >= total["cases"] > 0 and not (total["mixed_ready"] or total["unrecovered"] or missed),
    }  # fmt: skip


class _Bench:
    """One model's machine."""

    def __init__(self, model: str, box: Box, folder: Path) -> None:
        self.model, self.box = model, box
        self.journal = folder / "mig.journal"
        self.kept, self.moved = _places(model)
        self._states: tuple[bytes, bytes] = b"", b""
        self._seen: list[Layout | None] = []

    def deeds(self) -> Iterator[Deed]:
        """Yield what is disturbed: each kind of change, what picks one up, what makes all anew, and a mere look."""
        kept, moved = self.kept, self.moved
        less, more = _on(kept), _on(kept, moved)
        create, destroy = (Change(CARD, kind, moved.profile, moved.start) for kind in (CREATE, DESTROY))
        yield Deed(CREATE, lambda: self._settled(kept), _doing(create), (kept,), (less, more))
        yield Deed(DESTROY, lambda: self._settled(kept, moved), _doing(destroy), (kept, moved), (more, less))
        if not self.box.get(0, "mig_needs_reset"):  # else a mode never changes under a running driver
            yield Deed(MODE_ON, self._settled, _doing(Change(CARD, MODE_ON)), (), (OFF, ON))
            yield Deed(MODE_OFF, lambda: self._settled(mode=1), _doing(Change(CARD, MODE_OFF)), (), (ON, OFF))
        yield Deed("recover a create", lambda: self._died(create, kept), Divider.recover, (kept,), (less, more))
        yield Deed("recover a destroy", lambda: self._died(destroy, kept, moved), Divider.recover, (kept, moved),
                   (more, less))  # fmt: skip
        yield Deed(
            "restore", lambda: self._rebooted(kept, moved), _restoring((kept, moved)), (kept, moved), (more, more)
        )
        yield Deed(LOOK, lambda: self._settled(kept, moved), self._looking, (kept, moved), (more, more))

    def run(self, deed: Deed) -> Row:
        """Disturb a deed in every way."""
        row = Row(self.model, deed.name)
        self._fresh()
        deed.prepare()
        self.box.heal()
        state = self.box.state.read_bytes()
        self._states = state, self.journal.read_bytes()
        names, row.writes = self._undisturbed(deed)
        row.calls = len(names)
        for fault in faults(names, row.writes, deadly=deed.name != LOOK):  # a look that dies leaves nothing
            self._load()
            self._seen.clear()
            told, struck = self._disturbed(deed, fault)
            if not struck:
                row.missed += 1
                row.findings.append(f"{fault.what}: it did not strike")
                continue
            row.cases += 1
            self._judge(row, deed, fault, told)
        return row

    def close(self) -> None:
        """Let go of the driver."""
        self.box.heal()
        Nvml().stop()

    def _fresh(self) -> None:
        self.box.heal()
        self.box.reset(0)
        self.box.mig(0, on=False)
        self.journal.unlink(missing_ok=True)

    def _settled(self, *places: Place, mode: int = 0) -> None:
        self.box.mig(0, on=bool(places) or bool(mode))
        divider = self._divider()
        divider.restore({CARD: places} if places or mode else {})
        divider.close()

    def _died(self, change: Change, *places: Place) -> None:
        """Come to a change that died half-way: a GPU instance without a compute instance."""
        self._settled(*places)
        half = ("nvmlGpuInstanceCreateComputeInstance", "nvmlGpuInstanceDestroy")[change.kind == DESTROY]
        self.box.fault(half, die=True)
        assert self._child(lambda: self._divider().change(change)) == DEATH

    def _rebooted(self, *places: Place) -> None:
        self._settled(*places)
        self.box.reboot()

    def _load(self) -> None:
        """Have machine and journal as they were before the deed."""
        state, journal = self._states
        with self.box.state.open("r+b") as file:
            file.write(state)
        self.journal.write_bytes(journal)
        self.box.refresh()

    def _divider(self) -> Divider:
        """Return what a new process has; the driver fails nothing yet."""
        divider = self._unloaded()
        divider.recover()
        return divider

    def _unloaded(self) -> Divider:
        return Divider(Journal(self.journal), boot=self.box.boot_id.read_text, pause=lambda _seconds: None)

    def _started(self, deed: Deed) -> Divider:
        return self._unloaded() if deed.act is Divider.recover or deed.name == "restore" else self._divider()

    def _undisturbed(self, deed: Deed) -> tuple[list[str], int]:
        """Do the deed once; return the driver's functions that it called, and how often the journal was written."""
        self._load()
        divider = self._started(deed)
        since, writes = self.box.calls, 0
        real = os.fsync

        def count(file: File) -> None:
            nonlocal writes
            writes += 1
            real(file)

        os.fsync = count  # type: ignore[assignment]
        try:
            results = deed.act(divider)
        finally:
            os.fsync = real
        names = self.box.called(since)
        divider.close()
        ready = self._ready(self._divider())
        if ready not in deed.ends or (deed.name in {CREATE, DESTROY, MODE_ON, MODE_OFF} and ready != deed.ends[1]):
            raise MigFaultsError(f"{self.model}: {deed.name} does not work when nothing fails: {results}, {ready}.")
        return names, writes

    def _disturbed(self, deed: Deed, fault: Fault) -> tuple[list[Result], bool]:
        """Do the deed with the fault; return what it said, and whether the fault struck."""
        if fault.die or fault.write:
            status = self._child(lambda: self._acting(deed, fault))
            if fault.reboot:
                self.box.reboot()
            return [], status == DEATH
        since, told = self._acting(deed, fault)
        return told, self.box.calls - since >= fault.call

    def _acting(self, deed: Deed, fault: Fault) -> tuple[int, list[Result]]:
        divider = self._started(deed)
        if fault.write:
            _die_at_write(fault.write, late=fault.late)
        since = self.box.calls
        if fault.call:
            self.box.fault(
                "*", nth=fault.call, times=fault.times, code=fault.code, sleep_ms=fault.hang_ms, die=fault.die,
                late=fault.late,
            )  # fmt: skip
        try:
            told = deed.act(divider)
        except JournalError as error:
            raise MigFaultsError(str(error)) from error
        self._seen.append(self._ready(divider))  # what the same process reports while the fault is still there
        return since, told

    @staticmethod
    def _child(work: Callable[[], object]) -> int:
        """Run something in a process of its own; return its exit status, negative: the signal."""
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _judge(self, row: Row, deed: Deed, fault: Fault, told: Sequence[Result]) -> None:
        """Report before and after a new process recovers, and hold the reports against the two layouts."""
        self.box.heal()
        divider = self._unloaded()
        seen = [*self._seen, self._ready(divider)]
        told = [*told, *divider.recover()]
        if divider.changing([CARD]):
            told += divider.restore({CARD: deed.wish} if deed.ends[0][0] == "on" else {})
        end = self._ready(divider)
        seen.append(end)
        row.checked += len(seen)
        allowed = {*deed.ends, OFF, ON} if fault.reboot and not deed.wish else {*deed.ends}
        if any(one is not None and one not in allowed for one in seen):
            row.mixed_ready += 1
            row.findings.append(f"{fault.what}: ready with {seen}")
        if end is None or end not in allowed:
            row.unrecovered += 1
            row.findings.append(f"{fault.what}: ended with {end}; {told}")
        elif not fault.reboot and end != _said(told, deed, end):
            row.unrecovered += 1
            row.findings.append(f"{fault.what}: said {told} and ended with {end}")
        divider.close()

    def _ready(self, divider: Divider) -> Layout | None:
        """Return the layout that an agent's report calls ready; None where it calls none so."""
        if divider.changing([CARD]):
            return None
        collector = Collector(Nvml(), node="bench", agent="bench")
        try:
            report = collector.look(boot="bench", seq=1, at_us=1, deep=True).report
        finally:
            collector.close()
        for device in report.devices:
            if device.uuid == CARD and not device.reconfiguring:
                parts = frozenset((one.profile, one.start, one.uuid is not None) for one in device.slices)
                return device.mig_mode, device.mig_pending, parts
        return None

    def _looking(self, divider: Divider) -> list[Result]:
        self._seen.append(self._ready(divider))
        return []


def faults(names: Sequence[str], writes: int, *, deadly: bool = True) -> Iterator[Fault]:
    """Yield what can go wrong with these calls and so many writes.

    Each call fails once, and is died at where that is `deadly`. Other codes, failure for good, a hang, and a restart of
    the machine after a death come at the calls that change something, and at the first and the last of each function
    that only reads.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, name in enumerate(names, start=1):
        first.setdefault(name, at)
        last[name] = at
    for at, name in enumerate(names, start=1):
        special = name in WORKS or at in {first[name], last[name]}
        yield from _failures(at, name, special=special)
        if deadly:
            yield from _deaths(at, name, special=special)
    for write in range(1, writes + 1):
        for late in (False, True):
            for reboot in (False, True):
                where = f"{'behind' if late else 'at'} write {write} of the journal{', restart' if reboot else ''}"
                yield Fault(f"death {where}", write=write, late=late, reboot=reboot)


def _failures(at: int, name: str, *, special: bool) -> Iterator[Fault]:
    what = f"{name} (call {at})"
    yield Fault(f"{what} answers {UNKNOWN} once", at, UNKNOWN)
    if special:
        yield Fault(f"{what} and all that follow fail", at, UNKNOWN, 10**6)
        yield Fault(f"{what} hangs and fails", at, UNKNOWN, hang_ms=HANG_MS)
        for code in (LOST, FORGOTTEN, *WORKS.get(name, ())):
            yield Fault(f"{what} answers {code} once", at, code)
    if name in WORKS:
        yield Fault(f"{what} works and answers {UNKNOWN}", at, UNKNOWN, late=True)


def _deaths(at: int, name: str, *, special: bool) -> Iterator[Fault]:
    what = f"{name} (call {at})"
    for reboot in (False, True)[: 1 + special]:
        again = ", restart" if reboot else ""
        yield Fault(f"death at {what}{again}", at, die=True, reboot=reboot)
        if name in WORKS:
            yield Fault(f"death behind {what}{again}", at, die=True, late=True, reboot=reboot)


def _places(model: str) -> tuple[Place, Place]:
    """Return an instance that stays, and a larger one beside it that is made and destroyed."""
    table = geometry()
    gpu = table["gpus"][model]
    family = table["families"][gpu["family"]]
    plain = {shape: (name[0] if isinstance(name, list) else name, size, starts)
             for shape, _id, _row, _g, size, _most, starts, _media in family["shapes"]
             if (name := gpu["names"].get(shape)) and shape.isalnum()}  # fmt: skip
    small, _, starts = plain["1g"]
    large = max((one for one in plain.values() if one[1] * 2 <= family["memSlices"]), key=lambda one: one[1])
    return Place(small, starts[-1]), Place(large[0], large[2][0])


def _on(*places: Place) -> Layout:
    return "on", False, frozenset((one.profile, one.start, True) for one in places)


def _doing(change: Change) -> Callable[[Divider], list[Result]]:
    return lambda divider: [divider.change(change)]


def _restoring(places: Sequence[Place]) -> Callable[[Divider], list[Result]]:
    return lambda divider: [*divider.recover(), *divider.restore({CARD: places})]


def _said(told: Sequence[Result], deed: Deed, end: Layout) -> Layout:
    """Return the layout that the change's own last word promises; `end` where it gave none."""
    last = [one.outcome for one in told if one.change.kind == deed.name]
    if not last or last[-1] is Outcome.OPEN:
        return end
    return deed.ends[last[-1] is Outcome.DONE]


def _die_at_write(number: int, *, late: bool) -> None:
    """Have this process die at a write that reaches the disk, or behind it."""
    real, left = os.fsync, number

    def deadly(file: File) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = deadly  # type: ignore[assignment]


def show(report: Json) -> None:
    """Print the table for people to stderr."""
    table = Table("model", "change", "calls", "cases", "mixed ready", "unrecovered")
    for row in report["rows"]:
        table.add_row(*(str(row[key]) for key in ("model", "change", "calls", "cases", "mixed_ready", "unrecovered")))
    console = Console(stderr=True)
    console.print(table)
    for text in report["findings"]:
        console.print(text, highlight=False)
