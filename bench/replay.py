"""The exported journal, read line by line as an outsider: its chain, every Request's life, and who held what when.

Written from the published form of the journal; shares no code with the ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.allocations import over_held, read_allocation, slices_wrong
from bench.devices import GPU
from bench.geometry import card
from bench.oracle import Json, device_ask, exact, labels

GENESIS = "0" * 64
HOLDING = frozenset("RESERVED BINDING BOUND RUNNING RECLAIMING".split())
ENDED = frozenset("RELEASED EXPIRED CANCELLED REJECTED FAILED".split())
BOUND_BY = frozenset({"post", "adopt"})
_KEYS = frozenset("seq at request workload epoch fence event from to node prev hash".split())


@dataclass(slots=True)
class Life:
    """Where one Request stands after the lines read so far."""

    state: str
    node: str = ""
    namespace: str = ""
    name: str = ""
    allocation: Json = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """It has not ended."""
        return self.state not in ENDED

    @property
    def holding(self) -> bool:
        """It takes devices."""
        return self.state in HOLDING


@dataclass(slots=True)
class Replay:
    """What the whole journal says.

    Attributes:
        rows: lines read.
        broken: why the journal cannot be trusted, one sentence each; empty when it can.
        lives: last life of each Request, by its id.
        bound: ids that were ever bound.
        reserved: ids in the order of `reserve`.
        born_twice: ids that began anew while they lived.
        over, overlaps: node and what was held twice at some instant -> sentence.
    """

    rows: int = 0
    broken: list[str] = field(default_factory=list)
    lives: dict[str, Life] = field(default_factory=dict)
    bound: set[str] = field(default_factory=set)
    reserved: list[str] = field(default_factory=list)
    born_twice: list[str] = field(default_factory=list)
    over: dict[tuple[str, str], str] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], str] = field(default_factory=dict)


def line_hash(line: Json) -> str:
    """Return the hash that a journal line must carry."""
    body = {key: value for key, value in line.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def replay(lines: Iterable[Json], nodes: Mapping[str, Json], pods: Mapping[str, Json]) -> Replay:
    """Read the journal from its first line.

    Args:
        lines: the journal's lines in order.
        nodes: Node objects by name.
        pods: the pods that still exist, by UID; they say what a Request bound without an allocation takes.
    """
    found = Replay()
    on_node: dict[str, dict[str, Json]] = defaultdict(dict)
    at: dict[str, str] = {}
    prev = GENESIS
    for seq, line in enumerate(lines, start=1):
        found.rows = seq
        _check_chain(found, line, seq, prev)
        prev = str(line.get("hash", ""))
        if line.get("request") and line.get("event"):
            _live_on(found, line)
            on_node[at.get(line["request"], "")].pop(line["request"], None)
            at[line["request"]] = found.lives[line["request"]].node
            _book(found, line, nodes, pods, on_node)
    return found


def _check_chain(found: Replay, line: Json, seq: int, prev: str) -> None:
    missing = _KEYS - line.keys()
    if missing:
        found.broken.append(f"line {seq} lacks {', '.join(sorted(missing))}")
    elif line["seq"] != seq:
        found.broken.append(f"line {seq} is numbered {line['seq']}")
    elif line["prev"] != prev:
        found.broken.append(f"line {seq} does not follow the line before it")
    elif line["hash"] != line_hash(line):
        found.broken.append(f"line {seq} was changed after it was hashed")


def _live_on(found: Replay, line: Json) -> None:
    """Take the line into its Request's life; a step from a state that it is not in breaks the journal."""
    request, source = line["request"], line.get("from")
    before = found.lives.get(request)
    if source is None and before is not None and before.live:
        found.born_twice.append(request)
    elif source is not None and (before is None or before.state != source):
        at = before.state if before else "unknown"
        found.broken.append(f"line {line.get('seq')}: {request} leaves {source} but was {at}")
    life = Life(str(line.get("to")), str(line.get("node") or ""))
    life.namespace, life.name = str(line.get("namespace") or ""), str(line.get("name") or "")
    if life.holding:
        life.allocation = _allocation(line) or (before.allocation if before and before.holding else {})
    found.lives[request] = life
    if line["event"] == "reserve":
        found.reserved.append(request)
    if line["event"] in BOUND_BY and life.holding:
        found.bound.add(request)


def _allocation(line: Json) -> Json:
    told = line.get("allocation") or {}
    return told if isinstance(told, dict) else read_allocation(str(told)) or {}


def _book(
    found: Replay,
    line: Json,
    nodes: Mapping[str, Json],
    pods: Mapping[str, Json],
    on_node: dict[str, dict[str, Json]],
) -> None:
    """Book what the Request holds now, if anything, and look at its node as it is at this instant."""
    request = line["request"]
    life = found.lives[request]
    node = nodes.get(life.node)
    if not life.holding or node is None:
        return
    held = life.allocation if life.allocation.get("node") == life.node else _unwritten(request, node, pods)
    holders = on_node[life.node]
    holders[request] = held
    for what, sentence in over_held(node, holders):
        found.over.setdefault((life.node, what), f"line {line.get('seq')}: {life.node} {what}: {sentence}")
    for what, sentence in slices_wrong(node, holders):
        found.overlaps.setdefault((life.node, what), f"line {line.get('seq')}: {life.node} {what}: {sentence}")


def _unwritten(request: str, node: Json, pods: Mapping[str, Json]) -> Json:
    """Return what a Request takes whose allocation nobody wrote: its count on observed nodes, nothing known else."""
    pod = pods.get(request)
    ask = device_ask(pod) if pod and not exact(node) else None
    if ask is None or not ask.count:
        return {}
    known = card(labels(node).get(GPU + ".product", ""))
    profile = {"profile": known.profile_of(ask.resource)} if known and ask.kind == "mig" else {}
    return {"containers": {"": [{"kind": ask.kind, "count": ask.count, **profile}]}}
