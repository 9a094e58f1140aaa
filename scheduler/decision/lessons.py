"""What kube-scheduler has taught about single pods: the nodes that passed its own plugins, remembered for a while.

A call that names many nodes names exactly those on which volumes, pod affinity, spread and ports let the pod run, as
far as it had room there. They are kept as a bit per row; a row that was not there then, or had no room, is not held
against the pod.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from policies.columns import BoolArray

from .combine import Rows

KEPT_S = 600.0
LESSONS_MAX = 4096
_EVERY_NODE_BELOW = 100  # kube-scheduler names all feasible nodes of a cluster as small as this


def sampled(named: int, nodes: int) -> bool:
    """Say whether a call names as many nodes as kube-scheduler's default sampling does: others may do as well."""
    percent = max(5, 50 - nodes // 125)
    return nodes > _EVERY_NODE_BELOW and named == max(_EVERY_NODE_BELOW, nodes * percent // 100)


@dataclass(frozen=True, slots=True)
class _Lesson:
    bits: npt.NDArray[np.uint8]
    rows: int
    until_s: float


@dataclass(slots=True)
class Lessons:
    """Which nodes single pods may have, by pod uid; bounded, the oldest goes first."""

    _kept: dict[str, _Lesson] = field(default_factory=dict)

    def learn(  # noqa: PLR0917 - what one call tells
        self, uid: str, named: Rows, refused: int, live: BoolArray, busy: BoolArray, now_s: float
    ) -> bool:
        """Remember what a call for many nodes tells; say whether it leaves a node that the lesson before did not.

        Args:
            uid: the pod's.
            named: rows of the nodes that it names.
            refused: row of the node that was tried first and is not among them; -1 = none.
            live: ``[N]`` rows that are nodes; a node that fills a hole later is not held against the pod.
            busy: ``[N]`` nodes without room for it: that they are not named tells nothing of them.
            now_s: monotonic time.
        """
        nodes = len(live)
        mask = ~live | busy | sampled(len(named), int(np.count_nonzero(live)))
        mask[named] = True
        if refused >= 0:
            mask[refused] = False
        known = self.of(uid, nodes, now_s)
        self._kept.pop(uid, None)
        self._kept[uid] = _Lesson(np.packbits(mask), nodes, now_s + KEPT_S)
        if len(self._kept) > LESSONS_MAX:
            del self._kept[next(iter(self._kept))]
        return known is not None and bool((mask & ~known).any())

    def of(self, uid: str, nodes: int, now_s: float) -> BoolArray | None:
        """Return ``[N]`` the nodes that this pod may have, as far as it is known; None = nothing is known."""
        lesson = self._kept.get(uid)
        if lesson is None:
            return None
        if lesson.until_s <= now_s:
            del self._kept[uid]
            return None
        mask = np.ones(nodes, np.bool_)
        known = min(nodes, lesson.rows)
        mask[:known] = np.unpackbits(lesson.bits, count=lesson.rows)[:known]
        return mask

    def knows(self, uid: str) -> bool:
        """Say whether anything is remembered of a pod."""
        return uid in self._kept

    def forget(self, uid: str) -> None:
        """Drop what is remembered of a pod that is gone or bound."""
        self._kept.pop(uid, None)
