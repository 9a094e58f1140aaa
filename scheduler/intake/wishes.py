"""What a pod's label and annotations wish beside devices: queue, gang, class and run time; and what they misspell."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler import ALLOCATION, PREFIX, REQUEST, RETRY, TOUCH

from .devices import GPU_MEMORY, GPU_MILLI, GPU_MODEL
from .reading import NAME_MAX, Reader, Unreadable, shown
from .times import seconds

GANG = PREFIX + "gang"
GANG_SIZE = PREFIX + "gang-size"
CLASS = PREFIX + "class"
MAX_RUNTIME = PREFIX + "max-runtime"
QUEUE = PREFIX + "queue"
WISHES = frozenset({GPU_MEMORY, GPU_MILLI, GPU_MODEL, GANG, GANG_SIZE, CLASS, MAX_RUNTIME})
OURS = frozenset({ALLOCATION, REQUEST, TOUCH, RETRY, PREFIX + "paper-runtime"})  # the last one is the demo's kubelet's
LABELS = frozenset({QUEUE})
WARNINGS_MAX = 8
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
    if GANG in notes and GANG_SIZE not in notes:
        message = f"{GANG} needs a size; add the annotation {GANG_SIZE} with the number of pods, or take it away."
        reader.refuse(Unreadable(message, code="request.gang"))
    return Wishes(
        queue=reader.take(_queue, queue, DEFAULT_QUEUE),
        gang=reader.take(_gang, notes.get(GANG), ""),
        gang_size=reader.take(_gang_size, notes.get(GANG_SIZE), 0),
        workload_class=reader.take(_class, notes.get(CLASS), ""),
        max_runtime_s=reader.take(_max_runtime, notes.get(MAX_RUNTIME), 0),
    )


def misspelt(labels: Mapping[str, str], notes: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each label and annotation with our prefix that nobody knows, at most `WARNINGS_MAX`."""
    found: list[str] = []
    for kind, given, known, others in (("label", labels, LABELS, WISHES), ("annotation", notes, WISHES, LABELS)):
        unknown = sorted(key for key in given if key.startswith(PREFIX) and key not in known | OURS)
        for key in unknown[: WARNINGS_MAX - len(found)]:  # a near word is dear to find, a pod may bring thousands
            if key in others:
                advice = f"write it as {'an annotation' if kind == 'label' else 'a label'}"
            else:
                near = difflib.get_close_matches(key, sorted(known | others), n=1)
                advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            found.append(f"The {kind} {shown(key)} has no effect: {advice}")
    return tuple(found)


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
