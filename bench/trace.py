"""The public openb trace (Alibaba, 2023: GPU sharing) as nodes and pods, or a stand-in of the same marginals.

A trace lies in a folder as `openb/openb_node_list_gpu_node.csv` and `openb/openb_pod_list_NAME.csv`. It is a list of
pods without a usable history: arrivals are a shuffle of it, filled up by pods drawn again until the asked load is met.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.devices import GPU, MILLI, SHARE
from bench.kube_objects import node_object, pod_object

Json = dict[str, Any]

CARDS_MAX, AMOUNT_MAX = 64, 1 << 40
LOAD = 1.3  # arrivals end when the GPUs asked reach this part of the cluster's
NODES = "openb_node_list_gpu_node.csv"
MEMORY_MIB = {"T4": 15360, "P100": 16384, "V100M16": 16384, "V100M32": 32768, "A10": 23028}
"""G2 and G3 are undisclosed products; nobody knows their memory, and nobody asks for memory."""

SHAPES = (  # how many nodes, GPUs, model, cores, GiB: the shapes of the published list
    (549, 8, "G2", 96, 384),
    (387, 2, "T4", 104, 512),
    (107, 2, "P100", 64, 256),
    (22, 2, "P100", 16, 64),
    (39, 8, "G3", 128, 768),
    (28, 4, "V100M16", 32, 256),
    (21, 8, "V100M32", 96, 384),
    (19, 1, "V100M16", 8, 64),
    (17, 4, "T4", 104, 512),
    (9, 4, "V100M32", 48, 256),
    (8, 8, "V100M16", 64, 512),
    (2, 2, "P100", 16, 64),
    (3, 1, "P100", 8, 64),
    (2, 1, "A10", 32, 128),
)
GPUS_OF_PODS = ((0, 1000, 1088), (1, 1000, 3911), (2, 1000, 16), (4, 1000, 15), (8, 1000, 44))
SHARES_OF_PODS = tuple(
    (1, milli, count)
    for milli, count in (
        *((810, 1078), (470, 750), (320, 328), (650, 253), (230, 140), (460, 128)),
        *((100, 80), (200, 80), (300, 80), (500, 80), (700, 81)),
    )
)
"""GPUs, milli of each, how many pods: the marginals of `default`."""
CORES_PER_GPU = ((4, 0.15), (8, 0.27), (12, 0.36), (16, 0.15), (32, 0.07))
GIB_PER_CORE = 3


class TraceError(ValueError):
    """There is no such trace; the sentence says what would help."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One node of a trace."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str


@dataclass(frozen=True, slots=True)
class Task:
    """One pod of a trace: `milli` of each of its GPUs, and the models it allows (none: any)."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    milli: int
    models: tuple[str, ...] = ()

    @property
    def gpu_milli(self) -> int:
        """What it asks in all."""
        return self.gpus * self.milli


@dataclass(frozen=True, slots=True)
class Trace:
    """Machines and tasks; `source` says where they come from."""

    machines: list[Machine]
    tasks: list[Task]
    source: str

    @property
    def gpu_milli(self) -> int:
        """GPUs of all machines, in thousandths."""
        return MILLI * sum(machine.gpus for machine in self.machines)


def load(name: str, folder: Path | None) -> Trace:
    """Return a trace.

    Args:
        name: such as `openb:default`.
        folder: where traces lie; None takes the stand-in.

    Raises:
        TraceError: the name or the folder is wrong, or there is no stand-in for it.
    """
    kind, _, variant = name.partition(":")
    if kind != "openb" or not variant.isalnum():
        raise TraceError(f"--trace is openb:NAME, such as openb:default; not {name}.")
    if folder is None:
        if variant != "default":
            raise TraceError(
                f"Only openb:default has a built-in stand-in; name the traces' folder for {name}: --traces."
            )
        return _stand_in()
    listed = folder / "openb" / f"openb_pod_list_{variant}.csv"
    try:
        machines = [_machine(row) for row in _rows(folder / "openb" / NODES)]
        return Trace(machines, [_task(row) for row in _rows(listed)], f"{name} (Alibaba openb, public trace)")
    except (OSError, KeyError, ValueError) as error:
        raise TraceError(f"{listed}: cannot be read as a trace: {error!r}") from error


def load_all(written: str, folder: Path | None, nodes: Path | None) -> dict[str, Trace]:
    """Return the traces of a comma list by their names, such as `default`.

    Args:
        written: such as `openb:default,gpushare100`, or the path of a CSV file of pods.
        folder: where named traces lie.
        nodes: CSV file of nodes; then `written` is a path.

    Raises:
        TraceError: as `load` and `load_files`, or `nodes` is missing.
    """
    if nodes is not None or written.endswith(".csv"):
        if nodes is None:
            raise TraceError(f"--trace {written}: name the file of its nodes too: --nodes FILE.")
        return {Path(written).stem: load_files(Path(written), nodes)}
    kind, _, variants = written.partition(":")
    names = [variant.removeprefix(f"{kind}:") for variant in variants.split(",")]
    return {name: load(f"{kind}:{name}", folder) for name in dict.fromkeys(names)}


def load_files(pods: Path, nodes: Path) -> Trace:
    """Return a trace of one's own: two CSV files with the columns of the public one.

    Args:
        pods: `name, cpu_milli, memory_mib, num_gpu, gpu_milli`, optionally `gpu_spec`.
        nodes: `sn, cpu_milli, memory_mib, gpu, model`.

    Raises:
        TraceError: a file cannot be read, or a number in it makes no sense.
    """
    listed = nodes
    try:
        machines = [_machine(row) for row in _rows(nodes)]
        listed = pods
        trace = Trace(machines, [_task(row) for row in _rows(pods)], f"{pods.name} on {nodes.name}")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise TraceError(f"{listed}: cannot be read as a trace: {error!r}") from error
    _check(trace, pods, nodes)
    return trace


def _check(trace: Trace, pods: Path, nodes: Path) -> None:
    """Refuse what could not be replayed."""
    if not trace.gpu_milli or not any(task.gpu_milli for task in trace.tasks):
        raise TraceError(f"{pods} on {nodes}: there is no GPU, or nobody asks for one.")
    for machine in trace.machines:
        if not (0 <= machine.gpus <= CARDS_MAX and 0 <= machine.cpu_milli < AMOUNT_MAX):
            raise TraceError(f"{nodes}: {machine.name} has {machine.gpus} GPUs and {machine.cpu_milli} milli-CPU.")
    for task in trace.tasks:
        if not 0 <= task.cpu_milli < AMOUNT_MAX or not 0 <= task.memory_mib < AMOUNT_MAX:
            raise TraceError(f"{pods}: {task.name} asks {task.cpu_milli} milli-CPU and {task.memory_mib} MiB.")
        whole = task.milli == MILLI and 0 <= task.gpus <= CARDS_MAX
        if not whole and not (task.gpus == 1 and 0 < task.milli < MILLI) and (task.gpus or task.milli):
            raise TraceError(
                f"{pods}: {task.name} asks {task.gpus} GPUs of {task.milli} milli; 1000 each, or 1 of less."
            )
    for names, path in (([one.name for one in trace.machines], nodes), ([one.name for one in trace.tasks], pods)):
        if len(set(names)) < len(names):
            raise TraceError(f"{path}: a name is there twice.")


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as lines:
        yield from csv.DictReader(lines)


def _machine(row: dict[str, str]) -> Machine:
    return Machine(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]), int(row["gpu"]), row["model"])


def _task(row: dict[str, str]) -> Task:
    models = tuple(filter(None, (row.get("gpu_spec") or "").split("|")))
    amounts = [int(row[key]) for key in ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")]
    return Task(row["name"], amounts[0], amounts[1], amounts[2], amounts[3], models)


def _stand_in() -> Trace:
    """Return machines and tasks of the published marginals, always the same."""
    rng = np.random.default_rng(20230710)
    machines: list[Machine] = []
    for count, gpus, model, cores, gib in SHAPES:
        first = len(machines)
        machines += [Machine(f"node-{first + n:04}", 1000 * cores, 1024 * gib, gpus, model) for n in range(count)]
    tasks: list[Task] = []
    cores_of, chances = zip(*CORES_PER_GPU, strict=True)
    for gpus, milli, count in (*GPUS_OF_PODS, *SHARES_OF_PODS):
        for cores in rng.choice(cores_of, size=count, p=chances):
            cpu = 1000 * int(cores) * max(gpus, 1) * milli // MILLI
            tasks.append(Task(f"pod-{len(tasks):04}", cpu, GIB_PER_CORE * cpu * 1024 // 1000, gpus, milli))
    return Trace(machines, tasks, "stand-in for openb:default: same shapes, sizes and counts, drawn cores and memory")


def arrivals(trace: Trace, seed: int) -> list[Task]:
    """Return tasks in the order of their arrival, until 130 % of the GPUs are asked.

    The tasks by name, shuffled, then others drawn uniformly with replacement; a trace above 130 % is cut.
    """
    rng = np.random.default_rng(seed)
    tasks = sorted(trace.tasks, key=lambda task: task.name)
    order: Sequence[int] = rng.permutation(len(tasks)).tolist()
    chosen: list[Task] = []
    asked, place = 0, 0
    while asked < LOAD * trace.gpu_milli:
        chosen.append(tasks[order[place] if place < len(order) else int(rng.integers(len(tasks)))])
        asked, place = asked + chosen[-1].gpu_milli, place + 1
    return chosen


def at(percent: int, asked: Sequence[int], allocated: Sequence[int], gpu_milli: int) -> float | None:
    """Return the mean allocated share of the GPUs, in percent, over the arrivals at this rounded share of them.

    Args:
        percent: of the cluster's GPUs that have been asked for.
        asked: milli-GPU asked after each arrival.
        allocated: milli-GPU allocated after each arrival.
        gpu_milli: of the cluster.
    """
    found = [
        100 * have / gpu_milli
        for want, have in zip(asked, allocated, strict=True)
        if round(100 * want / gpu_milli) == percent
    ]
    return round(sum(found) / len(found), 3) if found else None


def node_of(machine: Machine) -> Json:
    """Return the machine as an exact node whose product label is the trace's model."""
    labels = {
        "tessera.dev/mode": "exact",
        f"{GPU}.product": machine.model,
        f"{GPU}.count": str(machine.gpus),
    }
    if machine.model in MEMORY_MIB:
        labels[f"{GPU}.memory"] = str(MEMORY_MIB[machine.model])
    extended = {GPU: str(machine.gpus), SHARE: str(64 * machine.gpus)} if machine.gpus else {}
    return node_object(
        machine.name, cpu=f"{machine.cpu_milli}m", memory=f"{machine.memory_mib}Mi", extended=extended, labels=labels
    )


def pod_of(task: Task, name: str) -> Json:
    """Return the task as a pod of ours: a share where it asks for a part of one GPU, else whole GPUs."""
    requests = {"cpu": f"{task.cpu_milli}m", "memory": f"{task.memory_mib}Mi"}
    annotations = {}
    if task.gpus and task.milli < MILLI:
        requests[SHARE] = str(task.gpus)
        annotations["tessera.dev/gpu-milli"] = str(task.milli)
    elif task.gpus:
        requests[GPU] = str(task.gpus)
    if task.gpus and task.models:
        annotations["tessera.dev/gpu-model"] = ",".join(task.models)
    return pod_object(name, requests=requests, annotations=annotations)
