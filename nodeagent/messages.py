"""What agent and Tessera tell each other over their one WebSocket; the reports themselves are `report`'s.

A message is one binary frame: a byte that says what it is, then JSON. The agent begins with HELLO and gets WELCOME;
then each FULL, DELTA and PAST is answered by ACK or REFUSED with the same boot id and sequence number, or by WANTED:
send the whole report. A delta is made against the report sent before it on the same connection.
Invariant: `apply` gives the report that `changes` was made for, or raises; what it gives has been through `decode`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeAlias, TypeVar

import orjson

from nodeagent.report import BYTES_MAX, BadReport, Count, Report, Sentence, Text, Whole, Word, decode, read

VERSION = 1
PATH = "/agents/v1"
AUDIENCE = "tessera-agent"
MESSAGE_MAX = BYTES_MAX + (1 << 16)
CHANGES_MAX, DEPTH_MAX = 20_000, 8

HELLO, FULL, DELTA, PAST = b"H", b"F", b"D", b"P"
WELCOME, ACK, REFUSED, WANTED = b"W", b"A", b"R", b"?"

Path: TypeAlias = list[str | int]
Change: TypeAlias = tuple[Path, Any]
_Message = TypeVar("_Message")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks: the machine, its start, the agent. `node_uid` where the agent knows the Node object's."""

    node: Annotated[str, Text(253, 1)]
    boot: Annotated[str, Text(63, 1)]
    agent: Word
    node_uid: Word = ""
    v: Annotated[int, Whole(VERSION, VERSION)] = VERSION


@dataclass(frozen=True, slots=True)
class Place:
    """Which report: the answer to one, and in WELCOME the last that Tessera has of this start; 0 = none."""

    boot: Annotated[str, Text(63, 1)]
    seq: Count
    why: Sentence = ""


def write(kind: bytes, message: Hello | Place) -> bytes:
    """Return a message as a frame."""
    return kind + orjson.dumps(asdict(message))


def take(what: type[_Message], body: bytes) -> _Message:
    """Return a message, given what follows the first byte of its frame. Raises BadReport with a sentence."""
    return read(what, _loaded(body), "the message")


def delta(old: bytes, new: bytes) -> bytes:
    """Return what leads from one encoded report to another, given what may have changed."""
    before, after = orjson.loads(old), orjson.loads(new)
    found: list[Change] = []
    _compare(before, after, [], found)
    return orjson.dumps({"base": before["seq"], "set": found})


def apply(old: bytes, change: bytes) -> tuple[bytes, Report]:
    """Return the report that a delta leads to, encoded and read.

    Args:
        old: the encoded report that it was made against.
        change: the delta.

    Raises:
        BadReport: it is none, was made against another report, or leads to none.
    """
    raw, tree = _loaded(change), orjson.loads(old)
    if not isinstance(raw, dict) or not isinstance(listed := raw.get("set"), list) or len(listed) > CHANGES_MAX:
        raise BadReport(f"the delta must be an object with a list `set` of at most {CHANGES_MAX} changes.")
    if raw.get("base") != tree["seq"]:
        raise BadReport("the delta was made against another report than the last one; send a full one.")
    for one in listed:
        _put(tree, one)
    try:
        body = orjson.dumps(tree)
    except orjson.JSONEncodeError as error:
        raise BadReport(f"the delta leads to no report ({error}).") from None
    return body, decode(body)


def _loaded(body: bytes) -> object:
    if len(body) > MESSAGE_MAX:
        raise BadReport(f"the message has {len(body)} bytes and may have {MESSAGE_MAX}.")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadReport(f"the message is no JSON ({error}).") from None


def _compare(old: Any, new: Any, path: Path, found: list[Change]) -> None:
    """Note where two trees differ: inside objects of the same keys and lists of the same length, else as a whole."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key, value in new.items():
            _compare(old[key], value, [*path, key], found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, value in enumerate(new):
            _compare(old[at], value, [*path, at], found)
    elif type(old) is not type(new) or old != new:
        found.append((path, new))


def _put(tree: Any, change: object) -> None:
    """Make one change in a tree. Raises BadReport where the tree has no such place."""
    match change:
        case [[*path, last], value] if len(path) < DEPTH_MAX:
            pass
        case _:
            raise BadReport("a change of the delta must be a path and a value.")
    for step in path:
        tree = tree[_step(tree, step)]
    tree[_step(tree, last)] = value


def _step(tree: Any, step: object) -> Any:
    there = (
        step in tree
        if isinstance(tree, dict) and isinstance(step, str)
        else isinstance(tree, list) and type(step) is int and 0 <= step < len(tree)
    )
    if not there:
        raise BadReport("a change of the delta is at a place that the report before does not have.")
    return step
