"""The whole agent on make-believe machines: reports, health, owners, the command line, and the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench.fakenvml.box import GIB, Box
from nodeagent.agent import Agent, Places
from nodeagent.doctor import EXACT, examine
from nodeagent.nvml import XID_EVENT, Event
from nodeagent.report import Report, decode, encode
from tests.nodeagent.host import Host
from tests.nodeagent.parts import divide

ROOT = Path(__file__).resolve().parents[2]
Machine = Callable[..., Box]


class Scene:
    """An agent, its machine and its clock."""

    def __init__(self, box: Box, host: Host) -> None:
        self.box, self.host, self.now_s = box, host, 1000.0
        self.agent = Agent(
            node="gpu-1", version="1.0.0", places=host.places, wall_us=lambda: int(self.now_s * 1e6),
            monotonic=lambda: self.now_s,
        )  # fmt: skip

    def look(self, *, seconds: float = 5, deep: bool = False) -> Report:
        self.now_s += seconds
        self.box.wait(seconds)
        report = self.agent.look(deep=deep)
        assert decode(encode(report)) == report
        return report


@pytest.fixture
def scene(machine: Machine, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(model: str = "H100-80", count: int = 2) -> Scene:
        box = machine(model, count)
        made.append(Scene(box, Host(tmp_path / "host", box.boot_id)))
        return made[-1]

    yield make
    for one in made:
        one.agent.close()
        one.host.kubelet.stop()


def told(report: Report) -> list[tuple[Any, ...]]:
    return [(use.kind, use.pod, use.memory_mib, use.processes) for use in report.uses]


def test_pods_and_squatters(scene: Callable[..., Scene]) -> None:
    one = scene("A100-80", 2)
    one.host.kubelet.give("train-a", Box.uuid(0))
    for pid, pod in ((42, "train-a"), (43, "sneak")):
        one.host.run(pid, pod)
    one.host.start(44, "0::/system.slice/xorg.service")
    for pid in (42, 43, 44):
        one.box.run(0, pid, GIB, sm=10)
    report = one.look()
    assert told(report) == [
        ("external", "", 1024, 1), ("pod", "train-a", 1024, 1), ("squatter", "sneak", 1024, 1)
    ]  # fmt: skip
    assert report.notes == ()
    assert (report.seq, one.look().seq) == (1, 2)


def test_a_kubelet_that_is_away_is_remembered_for_a_minute(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.host.kubelet.give("train-a", Box.uuid(0))
    one.look()
    one.host.kubelet.stop()
    report = one.look()
    assert [use.pod for use in report.uses] == ["train-a"]
    assert "kubelet" in report.notes[0]
    assert one.look(seconds=100).uses == ()


def test_ids_that_name_nothing_are_told(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.host.kubelet.give("train-a", "gpu-0003")
    report = one.look()
    assert report.notes == ("the kubelet gave out 1 device ids that name no device here (gpu-0003).",)
    one.agent.tokens = {"gpu-0003": [Box.uuid(1)]}
    report = one.look()
    assert ([use.device for use in report.uses], report.notes) == ([Box.uuid(1)], ())
    one.host.kubelet.give("train-b", *(f"{row}-" + "x" * 200 for row in range(3)))
    assert one.look().notes[0].startswith("the kubelet gave out 3 device ids")


def xid(index: int, code: int, gi: int | None = None) -> Event:
    return Event(Box.uuid(index), XID_EVENT, code, gi, None)


def states(report: Report) -> list[str]:
    return [device.health.state for device in report.devices]


def test_an_xid_takes_its_device_and_no_other(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.look()
    one.agent.hear(xid(0, 95))
    one.agent.hear(xid(0, 43))
    one.agent.hear(xid(0, 43))
    report = one.look()
    assert states(report) == ["DRAINING", "HEALTHY"]
    assert report.devices[0].health.reasons == ("XID 95", "needs: reset")
    assert {(row.code, row.count) for row in report.devices[0].xids} == {(95, 1), (43, 2)}


def test_an_xid_that_names_an_instance_takes_that_slice(scene: Callable[..., Scene]) -> None:
    one = scene("H100-80", 1)
    one.box.mig(0)
    large = divide(0, "3g.40gb", 4)
    divide(0, "1g.10gb", 0)
    one.look()
    one.agent.hear(xid(0, 95, gi=large.gi))
    device = one.look().devices[0]
    assert device.health.state == "HEALTHY"
    assert {part.profile: part.health.state for part in device.slices} == {"3g.40gb": "DRAINING", "1g.10gb": "HEALTHY"}
    large.destroy()
    one.look(deep=True)
    divide(0, "3g.40gb", 4)
    assert [part.health.state for part in one.look(deep=True).devices[0].slices] == ["HEALTHY", "HEALTHY"]


def test_the_whole_gpus_instance_has_number_zero(scene: Callable[..., Scene]) -> None:
    one = scene("H100-80", 1)
    one.box.mig(0)
    assert divide(0, "7g.80gb", 0).gi == 0
    one.look()
    one.agent.hear(xid(0, 95, gi=0))
    device = one.look().devices[0]
    assert (device.health.state, device.slices[0].health.state) == ("HEALTHY", "DRAINING")


def test_the_driver_asks_for_a_reset_and_a_reboot_gives_it(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.box.set(1, recovery=1)
    assert states(one.look()) == ["HEALTHY", "DRAINING"]
    one.box.reboot()
    report = one.look()
    assert (states(report), report.seq) == (["HEALTHY", "PROBATION"], 1)
    assert states(one.look(seconds=600)) == ["HEALTHY", "HEALTHY"]


def test_a_gpu_that_is_lost_comes_back_on_probation(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.look()
    one.box.lose(0)
    assert states(one.look()) == ["HEALTHY"]
    one.box.lose(0, 0)
    assert states(one.look(deep=True)) == ["BAD", "HEALTHY"]
    assert states(one.look(seconds=60)) == ["PROBATION", "HEALTHY"]


def test_an_application_error_of_three_pods_is_the_devices(scene: Callable[..., Scene]) -> None:
    one = scene("A100-80", 1)
    for at, pod in enumerate(("a", "b", "c")):
        one.host.kubelet.pods.clear()
        one.host.kubelet.give(pod, Box.uuid(0))
        assert states(one.look()) == ["HEALTHY"]
        one.agent.hear(xid(0, 31))
        assert at < 2 or states(one.look()) == ["SUSPECT"]


@pytest.mark.parametrize(
    "pods",
    [
        ("web-7d9f8c6b5-x2vbq", "web-7d9f8c6b5-h7kld", "web-5c4d9b7f68-zz9tk"),
        ("train-4kq2w", "train-zx8vb", "train-9tkln"),
        ("train-0-4kq2w", "train-1-zx8vb", "train-0-9tkln"),
        ("set-0", "set-1", "set-11"),
        ("night-29387520-4kq2w", "night-29388960-zx8vb", "night-29390400-9tkln"),
    ],
)
def test_pods_of_one_controller_are_one_workload(scene: Callable[..., Scene], pods: Sequence[str]) -> None:
    """Else a program with a bug takes one GPU after the other away."""
    one = scene("A100-80", 1)
    for pod in pods:
        one.host.kubelet.pods.clear()
        one.host.kubelet.give(pod, Box.uuid(0))
        one.look()
        one.agent.hear(xid(0, 31))
    assert states(one.look()) == ["HEALTHY"]


def test_the_kernels_numa_node(tmp_path: Path) -> None:
    folder = tmp_path / "bus/pci/devices/0000:18:00.0"
    folder.mkdir(parents=True)
    places = Places(sys=tmp_path)
    assert places.numa("00000000:18:00.0") is None
    for text, node in (("1\n", 1), ("-1\n", None), ("x", None)):
        (folder / "numa_node").write_text(text)
        assert places.numa("00000000:18:00.0") == node


def checks(places: Places, mode: str = "observed") -> dict[str, str]:
    return {one.check: one.status for one in examine(places, mode=mode)}


def test_a_doctor_that_finds_nothing_wrong(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.host.kubelet.plug("nvidia-gpu.sock")
    found = checks(one.host.places)
    assert set(found) == {
        "boot id", "driver", "GPUs", "MIG", "MIG permission", "pod-resources", "second device plugin", "processes"
    }  # fmt: skip
    assert set(found.values()) == {"ok"}


def test_in_exact_mode_a_second_plugin_is_a_fault(scene: Callable[..., Scene]) -> None:
    one = scene()
    one.host.kubelet.plug("nvidia-gpu.sock")
    found = {one.check: one for one in examine(one.host.places, mode=EXACT)}
    assert found["second device plugin"].status == "fail"
    assert "nvidia-gpu.sock" in found["second device plugin"].text
    assert found["kubelet"].status == "fail"  # no kubelet.sock yet
    one.host.kubelet.plug("kubelet.sock")
    assert checks(one.host.places, EXACT)["kubelet"] == "ok"


def test_a_doctor_says_what_to_do(scene: Callable[..., Scene], tmp_path: Path) -> None:
    one = scene()
    one.box.privileged(yes=False)
    one.box.lose(1)
    one.box.set(0, mig_pending=1)
    one.host.kubelet.stop()
    places = Places(tmp_path / "none", tmp_path, tmp_path, tmp_path / "none")
    found = examine(places)
    assert {one.check for one in found if one.status != "ok"} == {
        "boot id", "GPUs", "MIG mode", "MIG permission", "pod-resources", "device plugins", "processes"
    }  # fmt: skip
    assert all(one.do for one in found if one.status != "ok")


@pytest.mark.parametrize(("code", "word"), [(9, "kernel module"), (12, "runtime"), (18, "start the agent again")])
def test_a_doctor_without_driver(scene: Callable[..., Scene], code: int, word: str) -> None:
    one = scene()
    one.box.fault("nvmlInitWithFlags", code=code)
    (driver,) = (check for check in examine(one.host.places) if check.check == "driver")
    assert driver.status == "fail"
    assert word in driver.do


class Command:
    """`tessera-agent` as a process of its own, with the plain pynvml."""

    def __init__(self, one: Scene, library: Path) -> None:
        self.line = [sys.executable, "-m", "nodeagent", *one.host.arguments, "--node", "gpu-1"]
        self.environment = {**os.environ, **one.box.environment, "LD_LIBRARY_PATH": str(library.parent)}

    def __call__(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.line, *more], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )


def test_once_as_json(scene: Callable[..., Scene], library: Path) -> None:
    one = scene("H100-80", 8)
    one.box.gpm(0, 2, 50.0)
    done = Command(one, library)("--once", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    body = orjson.loads(line)
    assert (body["ok"], body["seed"], body["seq"]) == (True, None, 2)
    assert decode(line.encode()).devices[0].activity.sm_ratio == 0.5


def test_once_on_a_machine_without_driver(scene: Callable[..., Scene], library: Path) -> None:
    command = Command(scene(), library)
    del command.environment["FAKENVML_STATE"]
    done = command("--once", "--json")
    assert done.returncode == 1
    body = orjson.loads(done.stdout.splitlines()[-1])
    assert (body["ok"], body["devices"]) == (False, [])
    assert "driver is not loaded" in body["problem"]
    plain = command("--once")
    assert (plain.returncode, plain.stdout) == (1, "")
    assert "driver is not loaded" in plain.stderr


def test_once_for_people(scene: Callable[..., Scene], library: Path) -> None:
    one = scene()
    one.box.lose(1)
    done = Command(one, library)("--once")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == f" 0  NVIDIA H100 80GB HBM3  {Box.uuid(0)}  0/81559 MiB  HEALTHY"
    assert "GPU is lost" in done.stdout


def test_doctor_as_json_and_for_people(scene: Callable[..., Scene], library: Path) -> None:
    one = scene()
    one.host.kubelet.plug("nvidia-gpu.sock")
    command = Command(one, library)
    done = command("doctor", "--json")
    body = orjson.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, body["ok"], len(body["checks"])) == (0, True, 8)
    one.host.kubelet.stop()
    plain = command("doctor")
    assert plain.returncode == 1
    assert "fail pod-resources" in plain.stdout
    assert "-> mount /var/lib/kubelet/pod-resources" in plain.stdout


@pytest.mark.parametrize(
    "wrong", [["--metrics", "here"], ["--interval", "0"], ["--interval", "soon"], ["dance"], ["--mode", "odd"]]
)
def test_usage(wrong: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nodeagent", *wrong], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert "usage:" in done.stderr


def test_as_a_process(scene: Callable[..., Scene], library: Path) -> None:
    """It serves what it sees, hears an event long before its next look is due, and ends well on SIGTERM."""
    one = scene("H100-80", 8)
    command = Command(one, library)
    with subprocess.Popen(
        [*command.line, "--metrics", "127.0.0.1:0", "--interval", "60"], env=command.environment, cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            url = orjson.loads(process.stdout.readline())["metrics"]
            first = scrape(url, "tessera_agent_reports_total 1")
            assert b"tessera_agent_gpus_working 8" in first
            one.box.event(3, data=95)
            heard = scrape(url, "tessera_agent_reports_total 2").decode()
            assert f'tessera_agent_gpu_xids_total{{gpu="3",uuid="{Box.uuid(3)}",xid="95"}} 1' in heard
            assert f'tessera_agent_gpu_state{{gpu="3",uuid="{Box.uuid(3)}",state="DRAINING"}} 1' in heard
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_driver_that_is_upgraded_ends_the_process(scene: Callable[..., Scene], library: Path) -> None:
    one = scene("H100-80", 1)
    one.box.fault("nvmlInitWithFlags", code=18)
    done = Command(one, library)("--metrics", "127.0.0.1:0")
    assert done.returncode == 1
    assert "changed under this process" in done.stderr


def scrape(url: str, needle: str) -> bytes:
    """Scrape until a line is there; the server answers 503 before the first look."""
    until = time.monotonic() + 45
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                body: bytes = answer.read()
        except urllib.error.HTTPError:
            continue
        if needle.encode() in body:
            return body
    raise AssertionError(needle)
