"""What a pod's label and annotations wish beside devices: queue, gang, class and run time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler import PREFIX

from .reading import NAME_MAX, Reader, Unreadable, shown
from .times import seconds

GANG = PREFIX + "gang"
GANG_SIZE = PREFIX + "gang-size"
CLASS = PREFIX + "class"
MAX_RUNTIME = PREFIX + "max-runtime"
GANG_SIZE_MAX = 10_000
CLASSES = ("batch", "serving")
DEFAULT_QUEUE = "default"
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_GANG_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._/]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Wishes:
    """The wishes, each with its default where it is absent or was refused."""

    queue: str = DEFAULT_QUEUE
    gang: str = ""
    gang_size: int = 0
    workload_class: str = ""
    max_runtime_s: int = 0


def read_wishes(queue: str | None, notes: Mapping[str, str], reader: Reader) -> Wishes:
    """Return the wishes of a pod.

    Args:
        queue: the label's value, None where there is no label.
        notes: the pod's annotations.
        reader: keeps the refusals.
    """
    if queue is None and not notes:
        return Wishes()
    if GANG_SIZE in notes and GANG not in notes:
        message = f"{GANG_SIZE} needs a gang; add the annotation {GANG}, or take it away."
        reader.refuse(Unreadable(message, code="request.gang"))
    return Wishes(
        queue=reader.take(_queue, queue, DEFAULT_QUEUE),
        gang=reader.take(_gang, notes.get(GANG), ""),
        gang_size=reader.take(_gang_size, notes.get(GANG_SIZE), 0),
        workload_class=reader.take(_class, notes.get(CLASS), ""),
        max_runtime_s=reader.take(_max_runtime, notes.get(MAX_RUNTIME), 0),
    )


def _queue(label: str | None) -> str:
    if label is None:
        return DEFAULT_QUEUE
    if len(label) > NAME_MAX or _DNS_NAME.fullmatch(label) is None:
        message = f"the label {PREFIX}queue must be the name of a queue; {shown(label)} cannot be one."
        raise Unreadable(message, code="request.queue")
    return label


def _gang(note: str | None) -> str:
    if note is None:
        return ""
    if len(note) > NAME_MAX or _GANG_NAME.fullmatch(note) is None:
        message = f"{GANG} must be a name of letters, digits, '-', '.', '_' and '/'; it is {shown(note)}."
        raise Unreadable(message, code="request.gang")
    return note


def _gang_size(note: str | None) -> int:
    if note is None:
        return 0
    size = int(note) if note.isascii() and note.isdigit() and len(note) <= len(str(GANG_SIZE_MAX)) else 0
    if not 1 <= size <= GANG_SIZE_MAX:
        message = f"{GANG_SIZE} must be a whole number between 1 and {GANG_SIZE_MAX}; it is {shown(note)}."
        raise Unreadable(message, code="request.gang")
    return size


def _class(note: str | None) -> str:
    if note is None:
        return ""
    if note not in CLASSES:
        raise Unreadable(f"{CLASS} must be batch or serving; it is {shown(note)}.", code="request.class")
    return note


def _max_runtime(note: str | None) -> int:
    if note is None:
        return 0
    duration = seconds(note)
    if duration is None:
        message = f"{MAX_RUNTIME} must be a duration such as 90s, 8h or 1h30m; it is {shown(note)}."
        raise Unreadable(message, code="request.max_runtime")
    return duration
