"""Changes of MIG layouts on make-believe machines: the old layout or the new one, whatever the driver does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from bench.fakenvml.box import Box
from nodeagent.agent import Agent
from nodeagent.journal import CREATE, DESTROY, KINDS, MODE_OFF, MODE_ON, Change, Journal
from nodeagent.mig import STEPS, TRIES, Divider, Outcome, Place, Result, action, goal
from nodeagent.nvml import Gpu, Nvml
from nodeagent.report import decode, encode
from tests.nodeagent.host import Host
from tests.nodeagent.parts import divide

Machine = Callable[..., Box]
GIB = 2**30
CARD = Box.uuid(0)
SMALL, LARGE = Place("1g.10gb", 6), Place("3g.40gb", 0)
NOT_NOW = 999


class Scene:
    """A machine, and whoever divides it: a new one after each death."""

    def __init__(self, box: Box, path: Path) -> None:
        self.box, self.path, self.paused = box, path, [0.0]
        self.divider = self.born()

    def born(self) -> Divider:
        self.divider = Divider(Journal(self.path), boot=self.box.boot_id.read_text, pause=self.paused.append)
        return self.divider

    def ready(self, *places: Place) -> Divider:
        """Come to a device that has these instances and is not in change."""
        assert self.divider.recover() == []
        assert all(one.outcome is Outcome.DONE for one in self.divider.restore({CARD: places}))
        assert not self.divider.changing([CARD])
        return self.divider

    def layout(self) -> set[tuple[str, int | None, bool]]:
        """Return profile, start, and whether somebody could use it."""
        nvml = Nvml()
        assert nvml.start() is None
        gpu = next(one for one in nvml.find() if isinstance(one, Gpu) and one.uuid == CARD)  # type: ignore[union-attr]
        found = gpu.instances(gpu.profiles())  # type: ignore[arg-type]
        return {(one.name, one.start, one.ci is not None) for one in found}  # type: ignore[union-attr]


@pytest.fixture
def scene(machine: Machine, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(model: str = "H100-80", count: int = 1, *, on: bool = True) -> Scene:
        box = machine(model, count)
        box.mig(0, on=on)
        made.append(Scene(box, tmp_path / "mig.journal"))
        return made[-1]

    yield make
    for one in made:
        one.divider.close()


def create(place: Place) -> Change:
    return Change(CARD, CREATE, place.profile, place.start)


def destroy(place: Place) -> Change:
    return Change(CARD, DESTROY, place.profile, place.start)


def outcome(result: Result) -> tuple[Outcome, str]:
    return result.outcome, result.why


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_leads_on_and_its_undo_leads_back(kind: str) -> None:
    stage = goal(kind, back=True)
    for step in STEPS[kind]:
        assert (stage, action(kind, stage, back=False)) == (step.before, step.do)
        stage = step.after
    assert stage is goal(kind, back=False)
    for step in reversed(STEPS[kind]):
        assert action(kind, stage, back=True) == step.undo
        stage = step.before
    assert stage is goal(kind, back=True)


def test_an_instance_is_made_where_it_was_asked_and_destroyed(scene: Callable[..., Scene]) -> None:
    one = scene()
    made = one.ready().change(create(SMALL))
    assert (made.outcome, made.why) == (Outcome.DONE, "")
    assert made.uuid is not None
    assert made.uuid.startswith("MIG-")
    assert one.layout() == {("1g.10gb", 6, True)}
    assert one.divider.change(destroy(SMALL)) == Result(destroy(SMALL), Outcome.DONE)
    assert one.layout() == set()
    assert one.paused == [0.0]


def test_what_must_not_be_is_refused_before_anything_is_done(scene: Callable[..., Scene]) -> None:
    one = scene()
    divider = one.ready(SMALL)
    held = divider.change(create(LARGE)).uuid
    before, body = one.layout(), one.path.read_bytes()
    refusals = {
        create(SMALL): "it is so already.",
        create(Place("2g.20gb", 0)): "3g.40gb at 0 is in its place.",
        create(Place("2g.20gb", 2)): "3g.40gb at 0 is in its place.",
        create(Place("2g.20gb", 1)): "the device has no 2g.20gb that starts at 1.",
        create(Place("9g.99gb", 0)): "the device has no 9g.99gb that starts at 0.",
        destroy(Place("2g.20gb", 4)): "it is so already.",
        destroy(LARGE): "a pod holds the instance.",
        Change(CARD, MODE_OFF): "the device has 2 instances; destroy them first.",
        Change(CARD, MODE_ON): "it is so already.",
    }
    for change, why in refusals.items():
        assert outcome(divider.change(change, held={held or ""})) == (Outcome.REFUSED, why), change
    assert (one.layout(), one.path.read_bytes()) == (before, body)
    unknown = Change("GPU-gone", CREATE, "1g.10gb", 0)
    assert divider.change(unknown).outcome is Outcome.REFUSED


def test_an_instance_with_a_process_stays(scene: Callable[..., Scene]) -> None:
    one = scene()
    part = divide(0, "1g.10gb", 6)
    one.ready(LARGE)
    one.box.run(0, 42, GIB, gi=part.gi, ci=0)
    refused = one.divider.change(destroy(SMALL))
    assert outcome(refused) == (Outcome.REFUSED, "1 processes run on the instance; end them first.")
    assert one.divider.change(destroy(LARGE)).outcome is Outcome.DONE  # next to it
    one.box.end(0, 42, gi=part.gi, ci=0)
    one.box.run(0, 43, GIB, gi=part.gi, ci=0, mps=True)
    assert one.divider.change(destroy(SMALL)).outcome is Outcome.REFUSED
    one.box.fault("nvmlDeviceGetMPSComputeRunningProcesses_v3", code=NOT_NOW)
    one.box.end(0, 43, gi=part.gi, ci=0)
    assert "MPSCompute" in one.divider.change(destroy(SMALL)).why  # nobody can say whether somebody is there
    assert one.layout() == {("1g.10gb", 6, True)}


def test_who_came_between_the_look_and_the_step_keeps_the_instance(scene: Callable[..., Scene]) -> None:
    one = scene()
    divider = one.ready(SMALL)
    one.box.fault("nvmlComputeInstanceDestroy", code=19)
    undone = divider.change(destroy(SMALL))
    assert undone.outcome is Outcome.UNDONE
    assert "in use" in undone.why
    assert one.layout() == {("1g.10gb", 6, True)}
    assert not divider.changing([CARD])
    assert one.paused[1:] == [0.2, 0.4]


@pytest.mark.parametrize(
    ("change", "call"),
    [
        (create(SMALL), "nvmlDeviceCreateGpuInstanceWithPlacement"),
        (create(SMALL), "nvmlGpuInstanceCreateComputeInstance"),
        (destroy(LARGE), "nvmlComputeInstanceDestroy"),
        (destroy(LARGE), "nvmlGpuInstanceDestroy"),
    ],
)
def test_a_call_that_fails_is_tried_again_and_then_taken_back(
    scene: Callable[..., Scene], change: Change, call: str
) -> None:
    one = scene()
    divider = one.ready(LARGE)
    one.box.fault(call, code=NOT_NOW, times=TRIES)
    undone = divider.change(change)
    assert (undone.outcome, call.removeprefix("nvml") in undone.why) == (Outcome.UNDONE, True)
    assert one.layout() == {("3g.40gb", 0, True)}
    one.box.heal()
    one.box.fault(call, code=NOT_NOW, times=TRIES - 1)
    assert divider.change(change).outcome is Outcome.DONE


def test_a_change_that_can_go_nowhere_stays_in_change_until_it_can(scene: Callable[..., Scene]) -> None:
    one = scene()
    divider = one.ready()
    for call in ("nvmlGpuInstanceCreateComputeInstance", "nvmlGpuInstanceDestroy"):
        one.box.fault(call, code=NOT_NOW)
    stuck = divider.change(create(SMALL))
    assert stuck.outcome is Outcome.OPEN
    assert divider.changing([CARD]) == {CARD}
    assert divider.change(create(LARGE)).outcome is Outcome.REFUSED
    assert [result.outcome for result in one.born().recover()] == [Outcome.OPEN]
    one.box.heal()
    assert [result.outcome for result in one.divider.recover()] == [Outcome.UNDONE]
    assert (one.layout(), one.divider.changing([CARD])) == (set(), frozenset())


def test_what_was_made_but_not_noted_is_finished(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.ready()
    journal = Journal(one.path)
    journal.load()
    journal.started(create(SMALL), one.box.boot_id.read_text())
    divide(0, "1g.10gb", 6)
    divider = one.born()
    assert divider.changing([CARD]) == {CARD}
    assert [result.outcome for result in divider.recover()] == [Outcome.DONE]
    assert one.layout() == {("1g.10gb", 6, True)}
    assert not one.born().recover()


@pytest.mark.parametrize(("change", "end"), [(create(SMALL), Outcome.UNDONE), (destroy(SMALL), Outcome.DONE)])
def test_what_is_half_made_is_taken_back_and_what_is_half_destroyed_goes(
    scene: Callable[..., Scene], change: Change, end: Outcome
) -> None:
    one = scene()
    one.ready()
    journal = Journal(one.path)
    journal.load()
    journal.started(change, one.box.boot_id.read_text())
    pynvml.nvmlComputeInstanceDestroy(divide(0, "1g.10gb", 6).computes[0])
    assert one.layout() == {("1g.10gb", 6, False)}
    assert [result.outcome for result in one.born().recover()] == [end]
    assert one.layout() == set()


def test_after_a_restart_of_the_machine_the_wish_is_made_anew(scene: Callable[..., Scene]) -> None:
    one = scene("H100-80", 2)
    one.ready(SMALL, LARGE)
    journal = Journal(one.path)
    journal.load()
    journal.started(destroy(SMALL), one.box.boot_id.read_text())
    one.box.reboot()
    divider = one.born()
    closed = divider.recover()
    assert [outcome(result) for result in closed] == [(Outcome.UNDONE, "the machine was started anew.")]
    assert divider.changing([CARD, Box.uuid(1)]) == {CARD, Box.uuid(1)}
    made = divider.restore({CARD: [LARGE, SMALL]})
    assert [(result.change.kind, result.outcome) for result in made] == [
        (MODE_ON, Outcome.DONE), (CREATE, Outcome.DONE), (CREATE, Outcome.DONE),
    ]  # fmt: skip
    assert one.layout() == {("3g.40gb", 0, True), ("1g.10gb", 6, True)}
    assert not divider.changing([CARD, Box.uuid(1)])
    assert divider.restore({CARD: [LARGE, SMALL]}) == []


def test_a_wish_that_does_not_come_true_keeps_the_device_in_change(scene: Callable[..., Scene]) -> None:
    one = scene()
    divider = one.divider
    divider.recover()
    one.box.fault("nvmlGpuInstanceCreateComputeInstance", nth=2, code=23, times=TRIES)
    told = [result.outcome for result in divider.restore({CARD: [LARGE, SMALL]})]
    assert (told, divider.changing([CARD])) == ([Outcome.DONE, Outcome.UNDONE], {CARD})
    assert [result.outcome for result in divider.restore({CARD: [LARGE, SMALL]})] == [Outcome.DONE]
    assert not divider.changing([CARD])


def test_the_mode_changes_on_an_idle_device_alone(scene: Callable[..., Scene]) -> None:
    one = scene(on=False)
    one.divider.recover()
    one.divider.restore({})
    assert outcome(one.divider.change(create(SMALL)))[1] == "MIG is off on the device; switch it on first."
    one.box.run(0, 42, GIB)
    busy = one.divider.change(Change(CARD, MODE_ON))
    assert outcome(busy) == (Outcome.REFUSED, "1 processes run on the device; end them first.")
    one.box.end(0, 42)
    one.box.set(0, clients=1)  # dcgm, which is no process on the GPU
    undone = one.divider.change(Change(CARD, MODE_ON))
    assert (undone.outcome, "somebody uses the GPU" in undone.why) == (Outcome.UNDONE, True)
    assert (one.box.get(0, "mig_current"), one.box.get(0, "mig_pending")) == (0, 0)
    one.box.set(0, clients=0)
    assert one.divider.change(Change(CARD, MODE_ON)).outcome is Outcome.DONE
    assert one.divider.change(create(SMALL)).outcome is Outcome.DONE


def test_a_mode_that_takes_a_reset_is_not_left_waiting(scene: Callable[..., Scene]) -> None:
    one = scene("A100-80", on=False)
    one.divider.recover()
    one.divider.restore({})
    undone = one.divider.change(Change(CARD, MODE_ON))
    assert (undone.outcome, "must be reset first" in undone.why) == (Outcome.UNDONE, True)
    assert (one.box.get(0, "mig_current"), one.box.get(0, "mig_pending")) == (0, 0)


@pytest.mark.parametrize("new", [False, True])
def test_who_may_not_see_everything_changes_nothing(scene: Callable[..., Scene], new: bool) -> None:
    one = scene()
    one.ready(SMALL, LARGE)
    one.box.privileged(yes=False)
    if new:
        one.born().recover()
    refused = one.divider.change(destroy(LARGE))
    why = "does not say where instances may start" if new else "no permission (DeviceGetGpuInstances answered 4)"
    assert (refused.outcome, why in refused.why) == (Outcome.REFUSED, True)
    one.box.privileged(yes=True)
    assert one.layout() == {("1g.10gb", 6, True), ("3g.40gb", 0, True)}


def test_a_driver_that_was_loaded_anew_is_found_again(scene: Callable[..., Scene]) -> None:
    one = scene()
    divider = one.ready(SMALL)
    one.box.fault("nvmlDeviceGetMigMode", code=1, times=1)
    one.box.fault("nvmlDeviceGetCount_v2", code=1, times=1)
    assert divider.change(create(LARGE)).outcome is Outcome.DONE


def test_the_report_says_that_a_device_is_in_change(scene: Callable[..., Scene], tmp_path: Path) -> None:
    one = scene()
    host = Host(tmp_path / "host", one.box.boot_id)
    agent = Agent(node="n", version="1", places=host.places, wall_us=lambda: 1, monotonic=lambda: 1.0)
    agent.divider = one.divider

    def look() -> tuple[bool, list[str]]:
        device = decode(encode(agent.look())).devices[0]
        return device.reconfiguring, [part.profile for part in device.slices]

    try:
        assert look() == (True, [])
        one.ready()
        assert look() == (False, [])
        one.divider.change(create(LARGE))
        assert look() == (False, ["3g.40gb"])
        for call in ("nvmlComputeInstanceDestroy", "nvmlGpuInstanceCreateComputeInstance"):
            one.box.fault(call, code=NOT_NOW)
        assert one.divider.change(create(SMALL)).outcome is Outcome.UNDONE
        one.box.fault("nvmlGpuInstanceDestroy", code=NOT_NOW)
        assert one.divider.change(create(SMALL)).outcome is Outcome.OPEN
        assert look() == (True, ["3g.40gb", "1g.10gb"])
        one.box.heal()
        one.divider.recover()
        assert look() == (False, ["3g.40gb"])
    finally:
        agent.close()
        host.kubelet.stop()
