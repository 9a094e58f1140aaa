"""`tessera queue` and `tessera quota`: who may use what, who does, and who waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from .api import Api, RefusedError
from .output import console, reporting, say_json, table

Item = dict[str, Any]

ABSENT = "queue.not_found"
COLUMNS = ("QUEUE", "PARENT", "USED/QUOTA", "BORROWED", "PENDING>", "STATE")
LINE = ("POSITION>", "REQUEST", "PRIORITY>", "STATE", "REASON")
LIMITS = ("QUEUE", "KEY", "USED>", "NOMINAL>", "BORROWED>", "LENT>", "BORROW LIMIT>", "LEND LIMIT>", "MAY TAKE>")


def queue(name: str, url: str, *, as_json: bool) -> None:
    """Print all queues, or one with the requests that wait in it, the next one first."""
    with reporting(as_json=as_json):
        api = Api(url)
        if not name:
            found = api.items("/queues")
            if as_json:
                say_json({"queues": found}, ok=True)
            else:
                console().print(table(COLUMNS, map(_queue, found)))
            return
        try:
            one = api.get(f"/queues/{quote(name, safe='')}")
        except RefusedError as error:
            if error.code != ABSENT:
                raise
            raise RefusedError(ABSENT, f"there is no queue {name!r}; `tessera queue` lists them") from None
        if as_json:
            say_json(one, ok=True)
            return
        console().print(table(COLUMNS, [_queue(one)]))
        if one["text"]:
            console().print(f"\n{one['text']}")
        if one["waiting"]:
            console().print("", table(LINE, map(_waiting, one["waiting"])), sep="\n")


def quota(url: str, *, as_json: bool) -> None:
    """Print every key that is limited, queue by queue, children under their parents."""
    with reporting(as_json=as_json):
        found = Api(url).items("/queues")
        if as_json:
            say_json({"queues": found}, ok=True)
            return
        console().print(table(LIMITS, (row for depth, one in in_tree(found) for row in _limits(depth, one))))


def in_tree(queues: list[Item]) -> Iterator[tuple[int, Item]]:
    """Yield queues with their depth, each after its parent."""
    below: dict[str | None, list[Item]] = {}
    for one in queues:
        below.setdefault(one["parent"], []).append(one)
    open_ = [(0, one) for one in reversed(below.get(None, []))]
    while open_:
        depth, one = open_.pop()
        yield depth, one
        open_ += [(depth + 1, child) for child in reversed(below.get(one["name"], []))]


def state(one: Item) -> str:
    """Return a queue's state in a word."""
    if not one["ready"]:
        return "invalid"
    return "stopped" if one["stopped"] else "ok"


def _queue(one: Item) -> tuple[str, ...]:
    shown = one["shown"]
    return (
        one["name"],
        one["parent"] or "-",
        shown["used"] or "-",
        shown["borrowed"] or "-",
        str(one["pending"]),
        state(one),
    )


def _waiting(one: Item) -> tuple[str, ...]:
    return (
        str(one["position"]),
        f"{one['namespace']}/{one['name']}",
        str(one["priority"]),
        one["state"],
        one["reason"] or "-",
    )


def _limits(depth: int, one: Item) -> Iterator[tuple[str, ...]]:
    """Yield a row for each limited key; a queue without one has a row of its own."""
    name = "  " * depth + one["name"]
    if not one["available"]:
        yield name, "no limit", *("-",) * (len(LIMITS) - 3), "-" if state(one) == "ok" else "0"
    for key, free in one["available"].items():
        figures = (one[part].get(key, "-") for part in ("nominal", "borrowed", "lent", "borrowLimit", "lendLimit"))
        yield name, key, str(one["used"].get(key, 0)), *map(str, figures), str(free)
        name = ""
