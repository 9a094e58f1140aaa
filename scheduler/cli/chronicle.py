"""What the journal has told so far: counts, waits and the last decisions, read line by line as it grows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from scheduler.model.reservation import Event

DECISIONS_KEPT = 50
WAITS_KEPT = 200


@dataclass(frozen=True, slots=True)
class Decision:
    """One reservation as its decision record tells it.

    Attributes:
        at_us: wall time in microseconds.
        pod: namespace/name.
        gpus: whole GPUs, 0 = CPU-only.
        nodes: how many nodes there were before and after the masks.
        runner_up: the second best node, empty when there was none.
    """

    at_us: int
    pod: str
    gpus: int
    node: str
    nodes: tuple[int, int]
    runner_up: str


@dataclass(slots=True)
class Chronicle:
    """The journal in a few figures.

    Attributes:
        lines: how many lines were read.
        events: how often each event happened.
        bound: Requests that were ever bound.
        waits_s: seconds from submission to bound of the last ones.
        decisions: the last ones, newest first.
    """

    lines: int = 0
    events: Counter[str] = field(default_factory=Counter)
    bound: dict[str, None] = field(default_factory=dict)
    waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=DECISIONS_KEPT))
    _submitted_us: dict[str, int] = field(default_factory=dict)

    def read(self, lines: Iterable[dict[str, Any]]) -> None:
        """Take in the lines that follow those already read."""
        for line in lines:
            self.lines += 1
            self.events[line["event"]] += 1
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        event, request = line["event"], line["request"]
        if event == Event.SUBMIT:
            self._submitted_us[request] = line["at"]
        elif event == Event.RESERVE and line["decision"]:
            self.decisions.appendleft(_decision(line))
        elif event in {Event.POST, Event.ADOPT}:
            self.bound[request] = None
            self.waits_s.append((line["at"] - self._submitted_us.pop(request, line["at"])) / 1e6)

    def mean_wait_s(self) -> float:
        """Return the mean wait of the last pods that were bound."""
        return sum(self.waits_s) / len(self.waits_s) if self.waits_s else 0.0


def _decision(line: dict[str, Any]) -> Decision:
    record = orjson.loads(line["decision"])
    counts = [nodes for _, nodes in record["funnel"]]
    runner_up = record["runner_up"]["node"] if record["runner_up"] else ""
    nodes = (counts[0], counts[-1]) if counts else (0, 0)
    return Decision(
        line["at"], f"{line['namespace']}/{line['name']}", line["gpu_milli"] // 1000, line["node"], nodes, runner_up
    )
