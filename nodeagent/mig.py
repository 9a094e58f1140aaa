"""Making and destroying MIG instances, so that a device ends with its old layout or the new one, whatever fails.

A change is a walk over a table of steps. It is announced in the journal, each step is proved by reading the driver
again, and a walk that does not arrive goes back. What died on the way is finished or taken back by `recover`; what a
restart of the machine wiped out is made anew by `restore`. Invariant: a device in change, or not yet proved to have
what it should since the machine was started, is in `changing`, and counts as used.

One thread makes all calls. Not for the path of an allocation: a GPU instance takes a second to go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from nodeagent.journal import CREATE, DESTROY, MODE_OFF, MODE_ON, Change, Journal, JournalError
from nodeagent.nvml import Absent, Gpu, Instance, Nvml, Process, Why
from nodeagent.report import Profile

TRIES = 3
PAUSE_S = 0.2  # before the second try, and twice as long before the third
_COMPUTE_ROWS = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4, 8: 5, 6: 6}  # NVML_COMPUTE_INSTANCE_PROFILE_* by compute slices
_STATUS = {16: "the GPU must be reset first", 19: "somebody uses the GPU"}
_Read = TypeVar("_Read")


class Stage(Enum):
    """What is at a place of a device, or its MIG mode."""

    NOTHING = "nothing"
    EMPTY = "a GPU instance that nobody can use"
    WHOLE = "an instance"
    OFF = "MIG off"
    ON = "MIG on"
    PENDING = "a MIG mode that waits for a reset"


@dataclass(frozen=True, slots=True)
class Step:
    """What to `do` at a stage; it is verified by `after` being there, and taken back by `undo`."""

    before: Stage
    do: str
    after: Stage
    undo: str


UP = (
    Step(Stage.NOTHING, "make_instance", Stage.EMPTY, "drop_instance"),
    Step(Stage.EMPTY, "make_compute", Stage.WHOLE, "drop_compute"),
)
STEPS: Mapping[str, tuple[Step, ...]] = {
    CREATE: UP,
    DESTROY: tuple(Step(one.after, one.undo, one.before, one.do) for one in reversed(UP)),
    MODE_ON: (Step(Stage.OFF, "switch_on", Stage.ON, "switch_off"),),
    MODE_OFF: (Step(Stage.ON, "switch_off", Stage.OFF, "switch_on"),),
}
"""The steps of each kind of change, in order."""


def goal(kind: str, *, back: bool) -> Stage:
    """Return where a change ends, or where it began when it goes `back`."""
    return STEPS[kind][0].before if back else STEPS[kind][-1].after


def action(kind: str, stage: Stage, *, back: bool) -> str | None:
    """Return what to do at a stage on the way there or back; None at the end of the way, and off it."""
    if stage is Stage.PENDING:
        return STEPS[kind][0].undo if back else STEPS[kind][0].do
    if back:
        return next((one.undo for one in STEPS[kind] if one.after is stage), None)
    return next((one.do for one in STEPS[kind] if one.before is stage), None)


@dataclass(frozen=True, slots=True)
class Place:
    """An instance as the ledger names it: a profile of the device, and the memory slice it starts at."""

    profile: str
    start: int


class Outcome(Enum):
    """How a change ended: as wanted, as if it had never been, never begun, or not at all."""

    DONE = "done"
    UNDONE = "undone"
    REFUSED = "refused"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Result:
    """A change and how it ended; `why` is a sentence where it is not DONE, `uuid` the instance that was made."""

    change: Change
    outcome: Outcome
    why: str = ""
    uuid: str | None = None


class _UnansweredError(Exception):
    """The driver did not say what had to be known; the message is its answer."""


class Divider:
    """Changes MIG layouts of this machine."""

    def __init__(self, journal: Journal, *, boot: Callable[[], str], pause: Callable[[float], object]) -> None:
        """Touch nothing yet.

        Args:
            journal: not loaded; `recover` loads it.
            boot: returns the kernel's name of this start of the machine; may raise OSError.
            pause: waits so many seconds between two tries.
        """
        self._journal, self._boot, self._pause = journal, boot, pause
        self._nvml = Nvml()
        self._gpus: dict[str, Gpu] = {}
        self._profiles: dict[str, dict[str, Profile]] = {}
        self._loaded = False
        self.count = 0
        """Grows when a layout may have changed: whoever keeps handles of instances must find them anew."""

    def changing(self, devices: Iterable[str]) -> frozenset[str]:
        """Return those of the devices whose layout must not be relied upon. Raises OSError."""
        boot, journal = self._boot(), self._journal
        return frozenset(
            one for one in devices if not self._loaded or one in journal.open or journal.settled.get(one) != boot
        )

    def recover(self) -> list[Result]:
        """Finish or take back what was under way when the last process died; to be called at the start, and again.

        What cannot be ended now stays open, and its device in `changing`. What was begun before the machine was started
        is closed without a touch: no instance of it is left. Raises JournalError and OSError.
        """
        if not self._loaded:
            self._journal.load()
            self._loaded = True
        boot, results = self._boot(), []
        for change, began in list(self._journal.open.values()):
            if began == boot:
                results.append(self._ended(change, back_first=change.kind == CREATE and not self._arrived(change)))
            else:
                self._journal.ended(change.device, "undone")
                results.append(Result(change, Outcome.UNDONE, "the machine was started anew."))
        return results

    def restore(self, wish: Mapping[str, Sequence[Place]]) -> list[Result]:
        """Make what should be there and is not: after a start of the machine everything.

        Nothing is destroyed. A device that then has its wish leaves `changing`; so does one that nobody named.

        Args:
            wish: by device UUID its instances, from the ledger; a device with MIG on has an entry, maybe an empty one.

        Returns:
            What was made or failed. Raises JournalError and OSError.
        """
        assert self._loaded, "recover comes first"
        boot, results = self._boot(), []
        for device, places in wish.items():
            if device in self._journal.open:
                continue
            made = self._make(device, places)
            results += made
            if all(one.outcome is Outcome.DONE for one in made):
                self._journal.settle(device, boot)
        try:
            devices = set(self._find())
        except _UnansweredError:
            return results
        for device in sorted(devices - wish.keys() - self._journal.open.keys()):
            self._journal.settle(device, boot)
        return results

    def change(self, change: Change, *, held: Collection[str] = ()) -> Result:
        """Change one device, or refuse. Raises OSError.

        Args:
            change: a create is refused where the place is taken, a destroy where somebody uses or holds the instance,
                a mode where the device is not idle.
            held: UUIDs of instances that pods hold, for a pod may have no process yet.
        """
        if self.changing([change.device]):
            return Result(change, Outcome.REFUSED, "the device is in change; recover and restore come first.")
        return self._begun(change, held)

    def close(self) -> None:
        """Let go of the driver."""
        self._gpus.clear()
        self._nvml.stop()

    def _make(self, device: str, places: Sequence[Place]) -> list[Result]:
        """Switch MIG on where it is off, then make every place that is not there, until one fails."""
        results: list[Result] = []
        for change in (Change(device, MODE_ON), *(Change(device, CREATE, one.profile, one.start) for one in places)):
            if not self._arrived(change):
                results.append(self._begun(change, ()))
            if results and results[-1].outcome is not Outcome.DONE:
                break
        return results

    def _begun(self, change: Change, held: Collection[str]) -> Result:
        try:
            why = self._patient(lambda: self._refusal(change, held))
            if not why:
                self._journal.started(change, self._boot())
        except (_UnansweredError, JournalError) as error:
            why = str(error)
        return Result(change, Outcome.REFUSED, why) if why else self._ended(change, back_first=False)

    def _refusal(self, change: Change, held: Collection[str]) -> str:
        """Return why a change must not begin; empty = it may."""
        stage, gpu = self._stage(change), self._gpu(change.device)
        if stage is goal(change.kind, back=False):
            return "it is so already."
        if stage is Stage.PENDING:
            return "the device waits for a reset that changes its MIG mode; reset it first."
        if change.kind == CREATE:
            return self._no_room(change, gpu)
        return self._busy(change, gpu, held)

    def _busy(self, change: Change, gpu: Gpu, held: Collection[str]) -> str:
        processes, parts = self._processes(gpu), self._layout(gpu)
        if change.kind != DESTROY:
            if parts:
                return f"the device has {len(parts)} instances; destroy them first."
            return f"{len(processes)} processes run on the device; end them first." if processes else ""
        mine = [one for one in parts if _there(one, change)]
        if any(one.uuid in held for one in mine):
            return "a pod holds the instance."
        gis = {None, *(one.gi for one in mine)}  # a process that names no instance may be on any
        running = [one.pid for one in processes if one.gi in gis]
        return f"{len(running)} processes run on the instance; end them first." if running else ""

    def _no_room(self, change: Change, gpu: Gpu) -> str:
        if not _answer(gpu.mig_mode())[0]:
            return "MIG is off on the device; switch it on first."
        profile = self._profiles_of(gpu).get(change.profile)
        if profile is None or change.start not in profile.starts:
            return f"the device has no {change.profile} that starts at {change.start}."
        end = change.start + profile.size
        for one in self._layout(gpu):
            start, size = one.start or 0, one.size or 0
            if start < end and change.start < start + size:
                return f"{one.name} at {start} is in its place."
        return ""

    def _arrived(self, change: Change) -> bool:
        try:
            return self._patient(lambda: self._stage(change)) is goal(change.kind, back=False)
        except _UnansweredError:
            return False

    def _ended(self, change: Change, *, back_first: bool) -> Result:
        """Walk to one end, else to the other, and close the change there."""
        whys: list[str] = []
        for back in (back_first, not back_first):
            if why := self._walk(change, back=back):
                whys.append(why)
                continue
            try:
                self._journal.ended(change.device, "undone" if back else "completed")
            except JournalError as error:
                return Result(change, Outcome.OPEN, str(error))
            if back:
                return Result(change, Outcome.UNDONE, " ".join(whys) or "the process that began it died.")
            return Result(change, Outcome.DONE, uuid=self._uuid(change))
        return Result(change, Outcome.OPEN, " ".join(whys))

    def _walk(self, change: Change, *, back: bool) -> str:
        """Do steps until the driver says that the goal is there; return why it never did."""
        tries: Counter[str] = Counter()
        why = ""
        while True:
            name = "read"
            try:
                stage = self._stage(change)
                if stage is goal(change.kind, back=back):
                    return ""
                name = action(change.kind, stage, back=back) or ""
                assert name, f"{change} cannot be at {stage}"
                if tries[name] == TRIES:
                    return why
                why = f"{change}: the driver did not {name.replace('_', ' ')}."
                self._act(name, change)
            except _UnansweredError as error:
                why = f"{change}: {name.replace('_', ' ')}: {error}."
                self._gpus.clear()
            tries[name] += 1
            if tries["read"] == TRIES:
                return why
            if tries[name] > 1:
                self._pause(PAUSE_S * 2 ** (tries[name] - 2))

    def _act(self, name: str, change: Change) -> None:
        """Do one thing; whether it worked is for the next reading to say."""
        self.count += 1
        gpu = self._gpu(change.device)
        if name in {"switch_on", "switch_off"}:
            self._gpus.clear()  # what a GPU supports depends on the mode
            if status := _answer(gpu.ask("DeviceSetMigMode", int(name == "switch_on"))):
                raise _UnansweredError(f"{_STATUS.get(status, 'the driver failed')} ({status})")
            return
        if name == "make_instance":
            profile = self._profiles_of(gpu)[change.profile]
            _answer(gpu.divide(profile.id, change.start, profile.size))
            return
        for part in self._parts(gpu, change):
            handle = _answer(gpu.ask("DeviceGetGpuInstanceById", part.gi))
            if name == "drop_instance":
                _answer(gpu.ask("GpuInstanceDestroy", handle=handle))
            elif name == "drop_compute":
                compute = _answer(gpu.ask("GpuInstanceGetComputeInstanceById", part.ci, handle=handle))
                _answer(gpu.ask("ComputeInstanceDestroy", handle=compute))
            else:
                row = _COMPUTE_ROWS[self._profiles_of(gpu)[part.name].g]
                extent = _answer(gpu.ask("GpuInstanceGetComputeInstanceProfileInfo", row, 0, handle=handle))
                _answer(gpu.ask("GpuInstanceCreateComputeInstance", extent.id, handle=handle))

    def _stage(self, change: Change) -> Stage:
        """Read where the change stands."""
        gpu = self._gpu(change.device)
        current, pending = _answer(gpu.mig_mode())
        if change.kind in {MODE_ON, MODE_OFF}:
            return Stage.PENDING if current != pending else Stage.ON if current else Stage.OFF
        parts = self._parts(gpu, change) if current else []
        return Stage.NOTHING if not parts else Stage.EMPTY if parts[0].ci is None else Stage.WHOLE

    def _parts(self, gpu: Gpu, change: Change) -> list[Instance]:
        return [one for one in self._layout(gpu) if _there(one, change)]

    def _layout(self, gpu: Gpu) -> list[Instance]:
        """Return every instance with its place; none with MIG off."""
        if not _answer(gpu.mig_mode())[0]:
            return []
        found: list[Instance] = _answer(gpu.instances(list(self._profiles_of(gpu).values())))
        if (denied := gpu.denied.get("DeviceGetGpuInstances")) is not None:
            raise _UnansweredError(str(denied))  # what is found without permission is not everything
        return found

    def _profiles_of(self, gpu: Gpu) -> dict[str, Profile]:
        """Return the profiles by name; they are the model's and never change."""
        if gpu.uuid not in self._profiles:
            found = _answer(gpu.profiles())
            if any(not one.starts for one in found):
                raise _UnansweredError("the driver does not say where instances may start")
            self._profiles[gpu.uuid] = {one.name: one for one in found}
        return self._profiles[gpu.uuid]

    @staticmethod
    def _processes(gpu: Gpu) -> list[Process]:
        """Return who runs on the device, and fail rather than overlook somebody."""
        clients = gpu.ask("DeviceGetMPSComputeRunningProcesses_v3")
        if isinstance(clients, Absent) and clients.why is not Why.NOT_SUPPORTED:
            _answer(clients)
        return list(_answer(gpu.processes()))

    def _uuid(self, change: Change) -> str | None:
        if change.kind != CREATE:
            return None
        try:
            return self._patient(lambda: self._parts(self._gpu(change.device), change))[0].uuid
        except (_UnansweredError, IndexError):
            return None  # the next report names it

    def _gpu(self, device: str) -> Gpu:
        if device not in self._gpus:
            self._gpus = self._find()
        if device not in self._gpus:
            raise _UnansweredError(f"no GPU {device} answers")
        return self._gpus[device]

    def _find(self) -> dict[str, Gpu]:
        """Return the GPUs that answer, by UUID; anew from the start where the driver forgot us."""
        found = self._nvml.start() or self._nvml.find()
        if isinstance(found, Absent) and found.why is Why.STALE:
            self._nvml.stop()
            found = self._nvml.start() or self._nvml.find()
        return {one.uuid: one for one in _answer(found) if isinstance(one, Gpu)}

    def _patient(self, read: Callable[[], _Read]) -> _Read:
        """Read, again after a pause where the driver does not answer. Raises _UnansweredError."""
        for again in range(TRIES):
            try:
                return read()
            except _UnansweredError:
                self._gpus.clear()
                if again == TRIES - 1:
                    raise
                self._pause(PAUSE_S * 2**again)
        raise AssertionError


def _there(part: Instance, change: Change) -> bool:
    return (part.name, part.start) == (change.profile, change.start)


def _answer(value: Any) -> Any:
    """Return what the driver answered. Raises _UnansweredError."""
    if isinstance(value, Absent):
        raise _UnansweredError(str(value))
    return value
