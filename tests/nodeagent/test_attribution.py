"""Who uses which device: nothing is lost, nothing counted twice, and nobody hides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.attribution import Grant, Held, Holder, Owner, Running, fit, held, uses
from nodeagent.kubelet import KubeletError, PodResources
from nodeagent.owners import Owners, names_of, pod_of
from nodeagent.report import Activity, Device, Slice, Use
from tests.nodeagent.host import Kubelet

A, B, C = (Holder("ml", name, "main") for name in ("train-a", "train-b", "train-c"))
UID = "0b1c2d3e-0000-4000-8000-00000000000{}".format
ID = "{:064x}".format


def device(index: int = 0, used: int | None = 1000, busy: float | None = 0.8, slices: tuple[Slice, ...] = ()) -> Device:
    return Device(
        index, f"GPU-{index}", "H100", "bus", 1, 81920, mig_mode="on" if slices else "off", slices=slices,
        activity=Activity(memory_mib=81920, memory_used_mib=used, busy_ratio=busy),
    )  # fmt: skip


def part(ci: int, gi: int, used: int, busy: float | None = None) -> Slice:
    return Slice(
        gi, ci, f"MIG-{gi}-{ci}", "3g.40gb", gi, 1, 40960, activity=Activity(memory_used_mib=used, busy_ratio=busy)
    )


def process(pid: int, memory: int, busy: float | None = None, at: str = "GPU-0", part: str | None = None) -> Running:
    return Running(at, part, pid, memory, busy)


def told(found: list[Use]) -> list[tuple[Any, ...]]:
    return [(one.kind, one.pod, one.memory_mib, one.busy_ratio, one.processes) for one in found]


def test_a_pod_alone_and_what_nobody_owns() -> None:
    found = uses([device()], [process(1, 600, 0.5)], {1: Owner(UID(1), A)}, Held({"GPU-0": (A,)}, ()))
    assert told(found) == [("pod", "train-a", 600, 0.5, 1), ("external", "", 400, pytest.approx(0.3), 0)]
    assert (found[0].namespace, found[0].container, found[0].uid) == ("ml", "main", UID(1))


def test_two_pods_on_one_device_get_what_each_uses() -> None:
    running = [process(1, 600, 0.6), process(2, 300, 0.2), process(3, 100, 0.0)]
    owners = {1: Owner(UID(1), A), 2: Owner(UID(2), B), 3: Owner(UID(2), B)}
    found = uses([device()], running, owners, Held({"GPU-0": (A, B)}, ()))
    assert told(found) == [
        ("pod", "train-a", 600, pytest.approx(0.6), 1), ("pod", "train-b", 400, pytest.approx(0.2), 2)
    ]  # fmt: skip


def test_a_pod_on_a_device_that_it_does_not_hold_is_a_squatter() -> None:
    owners = {1: Owner(UID(1), A), 2: Owner(UID(2), B)}
    found = uses([device()], [process(1, 600), process(2, 300)], owners, Held({"GPU-0": (A,), "GPU-9": (B,)}, ()))
    assert told(found)[-2][:3] == ("squatter", "train-b", 300)


def test_processes_outside_pods_are_external() -> None:
    found = uses([device()], [process(1, 600)], {}, Held({}, ()))
    assert told(found) == [("external", "", 600, 0.8, 1), ("external", "", 400, 0.0, 0)]


def test_a_holder_that_runs_nothing_is_listed() -> None:
    assert told(uses([device(used=0, busy=0.0)], [], {}, Held({"GPU-0": (A,)}, ()))) == [("pod", "train-a", 0, 0.0, 0)]


def test_without_names_the_only_holder_is_meant_and_of_two_nobody() -> None:
    owners = {1: Owner(UID(1), None)}
    one = uses([device()], [process(1, 1000, 0.8)], owners, Held({"GPU-0": (A,)}, ()))
    assert told(one) == [("pod", "train-a", 1000, 0.8, 1)]
    two = uses([device()], [process(1, 1000, 0.8)], owners, Held({"GPU-0": (A, B)}, ()))
    assert [(use.kind, use.uid) for use in two if use.processes] == [("squatter", UID(1))]


def test_a_sibling_container_of_the_holder_is_no_squatter() -> None:
    sidecar = Holder("ml", "train-a", "sidecar")
    found = uses([device()], [process(1, 1000, 0.8)], {1: Owner(UID(1), sidecar)}, Held({"GPU-0": (A,)}, ()))
    assert [(use.kind, use.container, use.processes) for use in found] == [("pod", "main", 0), ("pod", "sidecar", 1)]


def test_who_is_alone_gets_a_busy_ratio_that_is_told_of_no_process() -> None:
    owners = {1: Owner(UID(1), A), 2: Owner(UID(2), B)}
    alone = uses([device()], [process(1, 600)], owners, Held({"GPU-0": (A, B)}, ()))
    assert [use.busy_ratio for use in alone if use.pod == "train-a"] == [0.8]
    two = uses([device()], [process(1, 600), process(2, 400)], owners, Held({"GPU-0": (A, B)}, ()))
    assert told(two)[-1] == ("external", "", 0, 0.8, 0)


def test_slices_and_what_lies_outside_them() -> None:
    divided = device(used=1000, busy=None, slices=(part(0, 1, 500, 0.4), part(0, 2, 300, None)))
    running = [process(1, 450, part="MIG-1-0")]
    found = uses([divided], running, {1: Owner(UID(1), A)}, Held({"MIG-1-0": (A,), "MIG-2-0": (B,)}, ()))
    assert [(use.slice, use.kind, use.pod, use.memory_mib) for use in found] == [
        (None, "external", "", 200),
        ("MIG-1-0", "pod", "train-a", 450), ("MIG-1-0", "external", "", 50),
        ("MIG-2-0", "pod", "train-b", 0), ("MIG-2-0", "external", "", 300),
    ]  # fmt: skip
    assert found[1].busy_ratio == 0.4


def test_compute_instances_of_one_gpu_instance_count_its_memory_once() -> None:
    divided = device(used=500, busy=None, slices=(part(0, 1, 500, 0.5), part(1, 1, 500, 0.5)))
    running = [process(1, 200, part="MIG-1-0"), process(2, 100, part="MIG-1-1")]
    found = uses([divided], running, {}, Held({}, ()))
    assert sum(use.memory_mib for use in found) == 500


NAMES = [A, B, C]


@given(st.data())
def test_what_pods_use_and_what_is_left_is_the_device(data: st.DataObject) -> None:
    used = data.draw(st.integers(0, 80_000) | st.none())
    busy = data.draw(st.floats(0, 1) | st.none())
    holders = tuple(sorted(data.draw(st.sets(st.sampled_from(NAMES)))))
    shares = data.draw(st.lists(st.tuples(st.integers(0, 40_000), st.none() | st.floats(0, 1)), max_size=6))
    running = [process(pid, memory, ratio) for pid, (memory, ratio) in enumerate(shares, 1)]
    owner = st.none() | st.builds(Owner, st.sampled_from([UID(1), UID(2)]), st.none() | st.sampled_from(NAMES))
    owners = {one.pid: who for one in running if (who := data.draw(owner)) is not None}
    found = uses([device(used=used, busy=busy)], running, owners, Held({"GPU-0": holders}, ()))
    total = sum(memory for memory, _ in shares) if used is None else used
    assert sum(use.memory_mib for use in found) == total
    assert all(use.memory_mib >= 0 for use in found)
    assert sum(use.processes for use in found) == len(running)
    if busy is None:
        assert {use.busy_ratio for use in found} <= {None}
    else:
        assert sum(use.busy_ratio or 0.0 for use in found) == pytest.approx(busy if found else 0.0, abs=1e-6)
        assert all(0.0 <= (use.busy_ratio or 0.0) <= 1.0 for use in found)
    assert {(use.namespace, use.pod) for use in found if use.kind == "pod"} >= {
        (one.namespace, one.pod) for one in holders
    }


@given(st.data())
def test_what_slices_use_and_what_is_left_is_the_device(data: st.DataObject) -> None:
    amounts = data.draw(st.lists(st.lists(st.integers(0, 5000), max_size=3), min_size=1, max_size=7))
    extra = data.draw(st.integers(0, 3000))
    parts = [part(0, gi, sum(memory) + extra) for gi, memory in enumerate(amounts)]
    outside = data.draw(st.integers(0, 2000))
    used = sum(one.activity.memory_used_mib or 0 for one in parts) + outside
    running = [
        process(100 * gi + at + 1, memory, part=f"MIG-{gi}-0")
        for gi, memories in enumerate(amounts) for at, memory in enumerate(memories)
    ]  # fmt: skip
    found = uses([device(used=used, busy=None, slices=tuple(parts))], running, {}, Held({}, ()))
    assert sum(use.memory_mib for use in found) == used
    for one in parts:
        assert sum(use.memory_mib for use in found if use.slice == one.uuid) == one.activity.memory_used_mib


@given(st.lists(st.integers(0, 10**6), max_size=8), st.integers(0, 10**6))
def test_fit_keeps_or_fills_the_total(amounts: list[int], total: int) -> None:
    fitted = fit(amounts, total)
    assert sum(fitted) == min(sum(amounts), total)
    assert all(0 <= new <= old for new, old in zip(fitted, amounts, strict=True))


def test_ids_of_the_kubelet() -> None:
    machine = [device(0), device(1), device(2, slices=(part(0, 1, 0),))]
    grants = [
        Grant(A, "nvidia.com/gpu", ("GPU-0",)),
        Grant(B, "nvidia.com/gpu", ("1", "GPU-0::3")),
        Grant(C, "nvidia.com/mig-3g.40gb", ("MIG-1-0",)),
        Grant(C, "nvidia.com/gpu", ("gpu-0003", "GPU-gone")),
        Grant(C, "example.com/nic", ("GPU-1",)),
    ]
    found = held(grants, machine, {"gpu-0003": ["GPU-1", "GPU-2"]})
    assert found.by == {"GPU-0": (A, B), "GPU-1": (B, C), "MIG-1-0": (C,), "GPU-2": (C,)}
    assert found.unknown == ("GPU-gone",)


@pytest.mark.parametrize(
    ("cgroup", "found"),
    [
        (f"0::/kubepods/burstable/pod{UID(1)}/{ID(7)}", (UID(1), ID(7))),
        (
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + UID(1).replace("-", "_")
            + f".slice/cri-containerd-{ID(7)}.scope", (UID(1), ID(7)),
        ),
        (f"0::/../../kubepods/pod{UID(1)}/crio-{ID(7)}.scope/container", (UID(1), ID(7))),
        (f"12:pids:/\n11:memory:/kubepods/pod{UID(1)}/{ID(7)}\n", (UID(1), ID(7))),
        (f"0::/kubepods/pod{'a' * 32}/{ID(7)}", ("a" * 32, ID(7))),
        (f"0::/kubepods/burstable/pod{UID(1)}", (UID(1), None)),
        ("0::/system.slice/sshd.service", None),
        ("0::/user.slice/podman-1234.scope", None),
        ("", None),
    ],
)  # fmt: skip
def test_cgroups(cgroup: str, found: tuple[str, str | None] | None) -> None:
    assert pod_of(cgroup) == found


def test_names_of_logs() -> None:
    found = names_of([f"train-a_ml_main-c-{ID(7)}.log", "junk.log", f"x_{ID(8)}.log"])
    assert found == {ID(7): Holder("ml", "train-a", "main-c")}


class Host:
    """A host's /proc and /var/log/containers."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.logs = folder / "proc", folder / "containers"
        self.logs.mkdir()

    def start(self, pid: int, cgroup: str, started: int = 1) -> None:
        (self.proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (self.proc / str(pid) / "cgroup").write_text(cgroup)
        (self.proc / str(pid) / "stat").write_text(f"{pid} (a b) c) S {' 0' * 18} {started} 0 0")


def test_owners_are_found_remembered_and_forgotten(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.start(1, f"0::/kubepods/pod{UID(1)}/{ID(1)}")
    host.start(2, "0::/system.slice/thing.service")
    owners = Owners(host.proc, host.logs)
    assert owners.of([1, 2, 3]) == {1: Owner(UID(1), None)}  # its log is not there yet
    (host.logs / f"train-a_ml_main-{ID(1)}.log").touch()
    assert owners.of([1, 2]) == {1: Owner(UID(1), A)}
    host.start(1, f"0::/kubepods/pod{UID(2)}/{ID(2)}")
    assert owners.of([1]) == {1: Owner(UID(1), A)}  # not read again while the process is the same
    host.start(1, f"0::/kubepods/pod{UID(2)}/{ID(2)}", started=2)
    assert owners.of([1]) == {1: Owner(UID(2), None)}


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    made = Kubelet(tmp_path)
    yield made
    made.stop()


def test_each_device_id_of_the_kubelet_is_an_entry_of_its_own(kubelet: Kubelet) -> None:
    kubelet.give("train-a", "gpu-0002", "gpu-0001")
    kubelet.give("plain")
    resources = PodResources(kubelet.folder)
    assert resources.list() == [Grant(A, "nvidia.com/gpu", ("gpu-0001", "gpu-0002"))]
    kubelet.pods.clear()
    assert resources.list() == []
    resources.close()


def test_a_kubelet_that_starts_anew_is_found_again(kubelet: Kubelet) -> None:
    kubelet.give("train-a", "gpu-0001")
    resources = PodResources(kubelet.folder)
    assert len(resources.list()) == 1
    kubelet.stop()
    with pytest.raises(KubeletError, match="kubelet"):
        resources.list()
    kubelet.serve()
    assert len(resources.list()) == 1
    resources.close()


def test_a_kubelet_that_is_away_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KubeletError, match="mount the host's"):
        PodResources(tmp_path).list()
