"""The independent auditor of a `bench cluster` run: it reads the dump and nothing else, and trusts none of it.

A dump is a folder with `nodes.json` and `pods.json` (Kubernetes lists at the end of the run), `journal.jsonl` (the
exported ledger), `calls.jsonl` (every extender call) and `run.json` (what the driver did). Invariant: nothing of
Tessera is imported, so a mistake there cannot hide itself here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.allocations import flaw, over_held, parsed, self_overlap, slices_wrong
from bench.oracle import Json, Oracle, bound_to, forbidden, observe, ours, terminal
from bench.queue_oracle import Rule, Tree, misordered, read_queues, runnable, violations, waiting_pods, was_held
from bench.replay import Replay, replay

QUIET_S = 30.0
WINDOW_S = 5.0
FILTER_CALLS_MAX = 2
FINDINGS_SHOWN = 10

ZERO = (
    *("waiting_placeable", "unannotated", "over_allocations", "slice_overlaps", "lost", "doubled"),
    *("quota_violations", "misordered", "misplaced", "drift", "crashed"),
)
"""Kinds of finding, each also a key of the report, that must not occur."""

NO_LIMITS = "quota_violations is 0 because the run had no queue with a limit: there was nothing to check"
NOBODY_HELD = "on_nominated is null because no pod went the queue way"


@dataclass(frozen=True, slots=True)
class Dump:
    """The files of one run, parsed.

    Attributes:
        nodes, pods: Kubernetes objects.
        journal: the ledger's lines; a line that is no JSON object is an empty one, which breaks the chain.
        calls: extender calls.
        run: seed, kills, and when the final quiet time began and ended; empty when the file is absent.
        tree: the queues of `queues.yaml`; none when the file is absent.
    """

    nodes: list[Json]
    pods: list[Json]
    journal: list[Json]
    calls: list[Json]
    run: Json = field(default_factory=dict)
    tree: Tree = field(default_factory=Tree)


def read_dump(folder: Path) -> Dump:
    """Read a dump.

    Raises:
        OSError: a file is missing.
        ValueError: a file other than the journal is no JSON.
    """
    run, queues = folder / "run.json", folder / "queues.yaml"
    return Dump(
        nodes=json.loads((folder / "nodes.json").read_text())["items"],
        pods=json.loads((folder / "pods.json").read_text())["items"],
        journal=[_line(text) for text in (folder / "journal.jsonl").read_text().splitlines()],
        calls=[json.loads(text) for text in (folder / "calls.jsonl").read_text().splitlines()],
        run=json.loads(run.read_text()) if run.exists() else {},
        tree=read_queues(queues if queues.exists() else None),
    )


def write_dump(folder: Path, nodes: Json, pods: Json, *, calls: Iterable[Json], run: Json, queues: str) -> None:
    """Write all of a dump but the journal; the folder is made when absent.

    Args:
        folder: where.
        nodes: Kubernetes list at the end of the run.
        pods: likewise.
        calls: extender calls.
        run: what the driver did.
        queues: documents of the queues, empty when there were none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodes.json").write_text(json.dumps(nodes))
    (folder / "pods.json").write_text(json.dumps(pods))
    (folder / "calls.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    (folder / "run.json").write_text(json.dumps(run))
    if queues:
        (folder / "queues.yaml").write_text(queues)


def _line(text: str) -> Json:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class Audit:
    """One pass over one dump.

    Attributes:
        findings: kind -> what and a sentence; the same thing is found once, however often it is seen.
        checked: answers that were compared with the oracle.
    """

    def __init__(self, dump: Dump) -> None:
        """Index the dump and replay its journal."""
        self._dump = dump
        self._nodes = {node["metadata"]["name"]: node for node in dump.nodes}
        self._mine = {pod["metadata"]["uid"]: pod for pod in dump.pods if ours(pod)}
        self._allocations = parsed(dump.pods)
        direct = dump.run.get("way") == "direct"  # there, the turn that wakes a refused pod writes the condition too
        self._held = {uid: pod for uid, pod in self._mine.items() if was_held(pod) and not direct}
        self._replay: Replay = replay(dump.journal, self._nodes, self._mine)
        self._rule = Rule(self._nodes, dump.tree)
        self._oracle: Oracle = observe(dump.nodes, dump.pods, self._allocations)
        self.findings: dict[str, dict[object, str]] = defaultdict(dict)
        self.checked = 0

    def report(self) -> Json:
        """Check everything and return the bench's keys, `ok`, `checked` and the first findings of each kind."""
        self._check_bound_pods()
        self._check_nodes()
        self._check_journal()
        self._check_queues()
        waiting = self._check_waiting_pods()
        calls = max_calls(self._quiet_filters(waiting))
        everyone = self._mine.keys() | self._replay.lives.keys()
        self._check_run(len(everyone))
        bound = self._replay.bound | {uid for uid, pod in self._mine.items() if bound_to(pod)}
        found: Json = {kind: len(self.findings[kind]) for kind in ZERO}
        journal_ok = not self._replay.broken and self._replay.rows > 0
        good = journal_ok and not any(found.values()) and calls <= FILTER_CALLS_MAX
        return {
            "pods": len(everyone),
            "bound": len(bound),
            "waiting": len(waiting),
            **found,
            "kills": self._dump.run.get("kills", 0),
            "max_filter_calls_5s": calls,
            "journal_ok": journal_ok,
            "on_nominated": self._on_nominated(),
            "released": [self._name(uid) for uid in self._replay.reserved],
            "checked": self.checked + self._replay.rows,
            "findings": self._shown(),
            "notes": self._notes(),
            "seed": self._dump.run.get("seed"),
            "ok": good and 2 * len(bound) >= len(everyone) > 0,
        }

    def _notes(self) -> list[str]:
        """Say which keys tell nothing, and why."""
        limits = [] if self._dump.tree.keys() else [NO_LIMITS]
        return limits if self._on_nominated() is not None else [*limits, NOBODY_HELD]

    def _check_run(self, known: int) -> None:
        """Compare with what the driver did: how many pods it made, and how Tessera ended when asked to."""
        missing = self._dump.run.get("pods", known) - known
        for number in range(missing):
            self._found("lost", number, "one of the pods that were created is in neither pods.json nor the journal")
        status = self._dump.run.get("exit_status", 0)
        if status:
            self._found("crashed", status, f"Tessera ended with status {status} when it was asked to end")

    def _found(self, kind: str, what: object, sentence: str) -> None:
        self.findings[kind].setdefault(what, sentence)

    def _shown(self) -> Json:
        shown = {kind: list(found.values())[:FINDINGS_SHOWN] for kind, found in sorted(self.findings.items()) if found}
        return {**shown, **({"journal": self._replay.broken[:FINDINGS_SHOWN]} if self._replay.broken else {})}

    def _name(self, uid: str) -> str:
        pod, life = self._mine.get(uid), self._replay.lives.get(uid)
        return str(pod["metadata"]["name"]) if pod else (life.name if life and life.name else uid)

    def _check_bound_pods(self) -> None:
        for uid, pod in self._mine.items():
            node = self._nodes.get(bound_to(pod))
            if node is None:
                continue
            self.checked += 1
            wrong = flaw(pod, node)
            if wrong:
                self._found("unannotated", uid, f"{self._name(uid)} {wrong}")
            twice = self_overlap(pod, self._allocations.get(uid, {}))
            if twice:
                self._found("doubled", uid, f"{self._name(uid)} holds {twice} twice")
            why = forbidden(pod, node)
            if why:
                self._found("misplaced", uid, f"{self._name(uid)} must not run on {bound_to(pod)}: {why}")

    def _check_nodes(self) -> None:
        """Look for what is held twice at the end, by the API server's objects alone."""
        holders: dict[str, dict[str, Json]] = defaultdict(dict)
        for pod in self._dump.pods:
            uid = pod["metadata"]["uid"]
            if bound_to(pod) and not terminal(pod):
                holders[bound_to(pod)][pod["metadata"]["name"]] = self._allocations.get(uid, {})
        for name, room in self._oracle.rooms.items():
            self.checked += 1
            for what, sentence in over_held(room.node, holders[name]):
                self._found("over_allocations", (name, what), f"at the end: {name} {what}: {sentence}")
            for what, sentence in slices_wrong(room.node, holders[name]):
                self._found("slice_overlaps", (name, what), f"at the end: {name} {what}: {sentence}")
            short = {what: left for what, left in {**room.free, "pods": room.pods}.items() if left < 0}
            for what, left in short.items():
                self._found("over_allocations", (name, what), f"at the end: {name} lacks {-left} of {what}")

    def _check_journal(self) -> None:
        told = self._replay
        for place, sentence in told.over.items():
            self._found("over_allocations", place, sentence)
        for place, sentence in told.overlaps.items():
            self._found("slice_overlaps", place, sentence)
        for uid in told.born_twice:
            self._found("doubled", uid, f"{self._name(uid)} began a new life while the old one lasted")
        for uid, pod in self._mine.items():
            if uid not in told.lives and not bound_to(pod) and not terminal(pod):
                self._found("lost", uid, f"{self._name(uid)} is in no journal line and not bound")
        for uid in sorted(told.lives.keys() | self._mine.keys()):
            why = self._drifts(uid)
            if why:
                self._found("drift", uid, f"{self._name(uid)} {why}")

    def _drifts(self, uid: str) -> str:
        """Return how journal and API server disagree on a Request at the end, empty when they agree."""
        life, pod = self._replay.lives.get(uid), self._mine.get(uid)
        runs = pod is not None and bool(bound_to(pod)) and not terminal(pod)
        if life is None or not life.holding:
            return "is bound and the ledger does not know" if runs else ""
        if not runs:
            return f"is {life.state} in the ledger and not bound"
        assert pod is not None
        if life.node != bound_to(pod):
            return f"is on {bound_to(pod)}, the ledger says {life.node}"
        same = not life.allocation or life.allocation == self._allocations.get(uid)
        return "" if same else "has another allocation than the ledger says"

    def _check_queues(self) -> None:
        """Follow the journal for what queues held, and for who passed whom."""
        dump = self._dump
        for sentence in violations(dump.journal, self._mine, self._nodes, dump.tree):
            self._found("quota_violations", sentence, sentence)
        for sentence in misordered(dump.journal, self._held, self._rule):
            self._found("misordered", sentence, sentence)

    def _on_nominated(self) -> float | None:
        """Return the part of the held pods that were bound where they had been nominated; None = there were none."""
        chosen = {line["request"]: line["node"] for line in self._dump.journal if line.get("event") == "reserve"}
        held = [uid for uid, pod in self._held.items() if bound_to(pod)]
        same = [uid for uid in held if bound_to(self._mine[uid]) == chosen.get(uid)]
        return round(len(same) / len(held), 4) if held else None

    def _check_waiting_pods(self) -> dict[str, Json]:
        """Try every unbound pod where order and quota let it run; return the waiting ones by namespace/name."""
        waiting = waiting_pods(self._mine.values())
        self.checked += len(self._nodes) * len(waiting)
        able = runnable(list(self._mine.values()), self._oracle, self._rule, self._allocations)
        for uid, nodes in able.items():
            self._found("waiting_placeable", uid, f"{self._name(uid)} waits and fits on {', '.join(nodes[:3])}")
        return {f"{pod['metadata']['namespace']}/{pod['metadata']['name']}": pod for pod in waiting}

    def _quiet_filters(self, waiting: Mapping[str, Json]) -> dict[str, list[float]]:
        """Return the times of /filter calls for each waiting pod within the final quiet time."""
        run, calls = self._dump.run, self._dump.calls
        end = run.get("quiet_end", max((call["t"] for call in calls), default=0.0))
        begin = run.get("quiet_begin", end - QUIET_S)
        times: dict[str, list[float]] = defaultdict(list)
        for call in calls:
            if call["verb"] == "filter" and begin <= call["t"] <= end and call["pod"] in waiting:
                times[call["pod"]].append(call["t"])
        return times


def max_calls(times: Mapping[str, Iterable[float]]) -> int:
    """Return the most calls for one pod within any five seconds, both ends included."""
    return max((count for one in times.values() for count in _windows(sorted(one))), default=0)


def _windows(times: list[float]) -> Iterator[int]:
    first = 0
    for last, time in enumerate(times):
        while time - times[first] > WINDOW_S:
            first += 1
        yield last - first + 1


def audit(folder: Path) -> dict[str, Any]:
    """Audit a dump and return its report.

    Raises:
        OSError: a file is missing.
        ValueError: a file other than the journal is no JSON.
    """
    return Audit(read_dump(folder)).report()
