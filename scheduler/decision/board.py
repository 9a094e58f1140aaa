"""One class of asks on every node, kept from call to call: only nodes that changed are judged anew.

A board keeps per node the first mask that fails and one key: its tier sums, first tier first, then its rank, as bytes
that compare as the order of preference does. The best of any named nodes is then one look at their keys. A node whose
generation has moved is *stale*; what Node objects say of it still holds, and bounds what it may be worth: its
*ceiling*. Stale nodes are judged when that, and then their first tier that is not static, could make a difference; all
together and without the others.

Invariant: a board names the same nodes in the same order as `judge` does on the whole cluster.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from policies.columns import Ask, BoolArray, FloatArray, Mix, Snapshot, empty_mix

from . import combine
from .catalog import MASKS, SCORES, STATIC_MASKS, STATIC_SCORES, Policies, Tier, asks_of, told_apart_by
from .combine import Rows
from .near import Near
from .pipeline import Failed, judge

BOARDS_MAX = 64
TIDIED_AT_ONCE = 256  # less than 1 ms
ROWS_MAX = 1_000_000  # of all boards together, about 80 MB

Keys = npt.NDArray[np.bytes_]
_LAST = 0xFFFFFFFF
_NEVER = -1


class Board:
    """What one class of asks makes of every node. Call `turn` first, and use it up before the columns change."""

    def __init__(self, policies: Policies, masks: Collection[str]) -> None:
        """Know nothing of any node yet."""
        self.masks = tuple(name for name in policies.masks if name in masks)
        leading = next((at for at, name in enumerate(self.masks) if name not in STATIC_MASKS), len(self.masks))
        self._static, self._live = self.masks[:leading], list(enumerate(self.masks))[leading:]
        self.policies = policies
        self._bytes = 4 * (len(policies.tiers) + 1)
        self._layout = _NEVER
        self._mix = empty_mix(0)
        self._known: dict[str, FloatArray] = {}
        self._leading: list[FloatArray] = []  # sums of the tiers before the first one that changes with bookings
        self._seen = np.zeros(0, np.int64)  # generation at which each node was judged
        self._first = np.zeros(0, np.int8)
        self._keys = np.zeros(0, f"S{self._bytes}")

    def turn(self, snapshot: Snapshot, ask: Ask, mix: Mix, layout: int) -> Board:
        """Turn to these live columns.

        Args:
            snapshot: the columns.
            ask: of this board's class.
            mix: what scores may read; another object = other contents.
            layout: grows whenever a Node object came, changed or went.
        """
        self._snapshot, self.ask = snapshot, ask
        if layout != self._layout:
            self._lay_out(snapshot, ask, mix)
            self._layout = layout
        if mix is not self._mix:
            self._mix = mix
            self._seen.fill(_NEVER)
        return self

    @property
    def rows(self) -> int:
        """How many nodes it has room for."""
        return len(self._seen)

    def best(self, rows: Rows | None = None, count: int = 1) -> Rows:
        """Return up to `count` of these nodes that pass, best first; None = of all nodes; one named twice is one."""
        if rows is None:
            rows = np.arange(self._snapshot.nodes)
        if not len(rows):
            return rows
        keys = self._keys.take(rows)
        stale = self._snapshot.generation.take(rows) != self._seen.take(rows)
        if stale.any():
            self._mend(keys, np.flatnonzero(stale), rows, count)
        if count == 1:
            top = keys.argmax()
            return rows[top : top + 1] if keys[top] else rows[:0]
        order = keys.argsort()[::-1][:count]
        found = keys[order]
        order = order[: np.count_nonzero(found != b"")]
        if (found[1:] == found[:-1])[: len(order)].any():
            return self.best(np.unique(rows), count)
        return rows.take(order)

    def settle(self, rows: Rows | None = None) -> Failed:
        """Judge these nodes where that is due; None = all. What is returned holds for them."""
        where = np.arange(self._snapshot.nodes) if rows is None else rows
        stale = where[self._snapshot.generation.take(where) != self._seen.take(where)]
        due = stale[self._ceilings.take(stale) != b""]
        if len(due):
            self._judge(due)
        return Failed(self.masks, self._first)

    def tidy(self, snapshot: Snapshot, mix: Mix, layout: int) -> bool:
        """Judge some nodes for which that is due, of all those that Node objects allow; False = there is none."""
        if self._layout == _NEVER:
            return False
        self.turn(snapshot, self.ask, mix, layout)
        due = np.flatnonzero((snapshot.generation != self._seen) & (self._ceilings != b""))[:TIDIED_AT_ONCE]
        if len(due):
            self._judge(due)
        return bool(len(due))

    def sums(self, row: int) -> list[float]:
        """Return the tier sums of a node that passes and is settled."""
        raw = np.frombuffer(self._keys[row].ljust(self._bytes, b"\0"), ">f4")
        sums: list[float] = raw[:-1].tolist()
        return sums

    def _lay_out(self, snapshot: Snapshot, ask: Ask, mix: Mix) -> None:
        """Take in what Node objects say, and scores that are the same everywhere for this kind of ask."""
        self._checks = [(at, MASKS[name]) for at, name in self._live if ask.kind in asks_of(name)]
        names = [name for tier in self.policies.tiers for name, _ in tier]
        static = [name for name in names if name in STATIC_SCORES or ask.kind not in told_apart_by(name)]
        self._known = {name: SCORES[name](snapshot, ask, mix) for name in static}
        settled = {
            at: combine.tier_sum([(weight, self._known[name]) for name, weight in tier])
            for at, tier in enumerate(self.policies.tiers)
            if all(name in self._known for name, _ in tier)
        }
        leading = takewhile(settled.__contains__, range(len(self.policies.tiers)))
        self._leading = [settled[at] for at in leading]
        failed = judge(snapshot, ask, mix, self.policies, self._static).failed.first
        last = np.full(snapshot.nodes, _LAST, np.uint32)
        self._ceilings = self._written(self._leading, last, failed < 0)
        self._keep(snapshot, failed, settled)

    def _keep(self, snapshot: Snapshot, failed: npt.NDArray[np.int8], settled: dict[int, FloatArray]) -> None:
        """Keep what was judged of nodes that have not changed themselves, with their new rank and settled sums."""
        before, seen, first = self._keys, self._seen, self._first
        self._keys = np.zeros(snapshot.nodes, self._ceilings.dtype)
        self._seen = np.full(snapshot.nodes, _NEVER, np.int64)
        self._first = failed.copy()
        same = np.flatnonzero((seen == snapshot.generation[: len(seen)]) & (failed[: len(seen)] < 0))
        mixed = any(
            name in self._known and at not in settled for at, tier in enumerate(self.policies.tiers) for name, _ in tier
        )
        if not len(same) or mixed:
            return
        self._seen[same], self._first[same], self._keys[same] = seen[same], first[same], before[same]
        passing = same[before[same] != b""]
        raw = self._keys.view(">u4").reshape(len(self._keys), -1)
        for at, one in settled.items():
            raw.view(">f4")[passing, at] = one[passing]
        raw[passing, -1] = _LAST - snapshot.rank[passing].astype(np.int64)

    def _mend(self, keys: Keys, stale: Rows, rows: Rows, count: int) -> None:
        """Judge the stale ones among `rows` that may be among the best, and write all their keys into `keys`."""
        keys[stale] = b""
        floor = keys[keys.argmax()] if count == 1 else np.sort(keys)[-count] if count <= len(keys) else b""
        due = stale[self._ceilings.take(rows.take(stale)) > floor]
        if len(due) and floor:
            due = due[self._bounds(rows.take(due)) > floor]
        if len(due):
            self._judge(rows.take(due))
            keys[due] = self._keys.take(rows.take(due))

    def _bounds(self, rows: Rows) -> Keys:
        """Return what these nodes may be worth at most, by the first tier that changes with what is booked."""
        near, leading = Near(self._snapshot, rows), len(self._leading)
        sums = [one.take(rows) for one in self._leading]
        sums += [self._sum(tier, near, self.ask, rows) for tier in self.policies.tiers[leading : leading + 1]]
        return self._written(sums, np.full(len(rows), _LAST, np.uint32), None)

    def _judge(self, rows: Rows) -> None:
        """Judge these nodes anew; all of them pass what Node objects say."""
        ask, near = self.ask, Near(self._snapshot, rows)
        if any(name == "allowed" for _, name in self._live):
            ask = replace(ask, allowed=ask.allowed[rows])
        found = [(at, mask(near, ask, self._mix)) for at, mask in self._checks]
        passes = np.ones(len(rows), np.bool_)
        for _, one in found:
            passes &= one
        first = np.full(len(rows), -1, np.int8)
        if not passes.all():
            for at, one in reversed(found):
                first[~one] = at
        sums = [self._sum(tier, near, ask, rows) for tier in self.policies.tiers]
        last = _LAST - self._snapshot.rank.take(rows).astype(np.int64)
        self._keys[rows] = self._written(sums, last, passes)
        self._first[rows] = first
        self._seen[rows] = self._snapshot.generation.take(rows)

    def _sum(self, tier: Tier, near: Snapshot, ask: Ask, rows: Rows) -> FloatArray:
        known = self._known
        return combine.tier_sum(
            [
                (weight, known[name].take(rows) if name in known else SCORES[name](near, ask, self._mix))
                for name, weight in tier
            ]
        )

    def _written(self, sums: list[FloatArray], last: npt.NDArray[np.integer], passes: BoolArray | None) -> Keys:
        """Write keys: non-negative float32 compare as their big-endian bytes do; a sum that is missing is the most."""
        raw = np.empty((len(last), self._bytes // 4), ">u4")
        raw[:, len(sums) : -1] = _LAST
        floats = raw.view(">f4")
        for at, one in enumerate(sums):
            floats[:, at] = one
        raw[:, -1] = last
        keys = raw.view(f"S{self._bytes}")[:, 0]
        if passes is not None:
            keys[~passes] = b""
        return keys


@dataclass(slots=True)
class Boards:
    """The boards of the classes asked of late, bounded in number and in memory."""

    policies: Policies
    _boards: OrderedDict[Hashable, Board] = field(default_factory=OrderedDict)

    def of(self, kind: Hashable, masks: tuple[str, ...]) -> Board:
        """Return the board of a class of asks under these masks; a new one when it was not asked of late."""
        key = kind, masks
        board = self._boards.get(key)
        if board is None:
            board = self._boards[key] = Board(self.policies, masks)
            while len(self._boards) > BOARDS_MAX or sum(one.rows for one in self._boards.values()) > ROWS_MAX:
                self._boards.popitem(last=False)
        self._boards.move_to_end(key)
        return board

    def tidy(self, snapshot: Snapshot, mix: Mix, layout: int) -> bool:
        """Judge some changed nodes anew for one class, those asked of last first; False = all are up to date."""
        return any(board.tidy(snapshot, mix, layout) for board in reversed(self._boards.values()))
