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
FEW = 3  # so many of the best are found sooner one by one than by sorting
BOUNDED_FROM = 64  # fewer nodes are judged outright: to bound them first costs nearly as much
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
        self.tiers = tuple("+".join(name for name, _ in tier) for tier in policies.tiers)  # as records call them
        self._tiers = policies.tiers  # of those that tell nodes apart, once the kind of ask is known
        self._layout = _NEVER
        self._synced = _NEVER  # the columns' generation up to which changes were noticed
        self._mix = empty_mix(0)
        self._known: dict[str, FloatArray] = {}
        self._alike: list[FloatArray | None] = []  # tier sums that do not tell nodes apart; None for those of the keys
        self._leading: list[FloatArray] = []  # sums of the tiers before the first one that changes with bookings
        self._stale = np.zeros(0, np.bool_)
        self._first = np.zeros(0, np.int8)
        self._keys = np.zeros(0, "S8")  # of stale nodes their ceilings

    def turn(self, snapshot: Snapshot, ask: Ask, mix: Mix, layout: int) -> Board:
        """Turn to these live columns.

        Args:
            snapshot: the columns; a node that changes gets a generation above all that there were.
            ask: of this board's class.
            mix: what scores may read; another object = other contents.
            layout: grows whenever a Node object came, changed or went.
        """
        self._snapshot, self.ask = snapshot, ask
        moved = np.flatnonzero(snapshot.generation > self._synced)
        if layout != self._layout:
            self._lay_out(snapshot, ask, mix, moved)
            self._layout = layout
        elif len(moved):
            self._doubt(moved)
        if len(moved):
            self._synced = int(snapshot.generation[moved].max())
        if mix is not self._mix:
            self._mix = mix
            self._doubt(np.arange(snapshot.nodes))
        return self

    def ask_for(self, mix: Mix, layout: int) -> Ask | None:
        """Return the ask it was last turned to, if another one of this class would be no different now."""
        return self.ask if layout == self._layout and mix is self._mix else None

    @property
    def rows(self) -> int:
        """How many nodes it has room for."""
        return len(self._stale)

    def best(self, rows: Rows | None = None, count: int = 1) -> Rows:
        """Return up to `count` of these nodes that pass, best first; None = of all nodes; one named twice is one."""
        if rows is None:
            if not self._stale.any():
                order: Rows = _top(self._keys, count) if len(self._keys) else np.zeros(0, np.intp)
                return order.compress(self._keys.take(order) != b"")
            rows = np.arange(self._snapshot.nodes)
        if not len(rows):
            return rows
        keys = self._keys.take(rows)
        order = _top(keys, count)
        if self._stale.take(rows.take(order)).any():
            self._mend(keys, rows, count)
            order = _top(keys, count)
        found = keys.take(order)
        order = order[: np.count_nonzero(found != b"")]
        if (found[1:] == found[:-1])[: len(order)].any():
            return self.best(np.unique(rows), count)
        return rows.take(order)

    def could(self) -> BoolArray:
        """Return ``[N]`` the nodes that this ask could use, were nothing booked there: what Node objects say of it."""
        could: BoolArray = self._ceilings != b""
        return could

    def settle(self, rows: Rows | None = None) -> Failed:
        """Judge these nodes where that is due; None = all. What is returned holds for them."""
        due = np.flatnonzero(self._stale) if rows is None else rows[self._stale.take(rows)]
        if len(due):
            self._judge(due)
        return Failed(self.masks, self._first)

    def tidy(self, snapshot: Snapshot, mix: Mix, layout: int) -> bool:
        """Judge some nodes for which that is due, of all those that Node objects allow; False = there is none.

        After a new layout or mix it waits for the next ask of its class: the last one may speak of other codes.
        """
        if layout != self._layout or mix is not self._mix:
            return False
        self.turn(snapshot, self.ask, mix, layout)
        due = np.flatnonzero(self._stale)[:TIDIED_AT_ONCE]
        if len(due):
            self._judge(due)
        return bool(len(due))

    def sums(self, row: int) -> list[float]:
        """Return the tier sums of a node that passes and is settled."""
        told = iter(np.frombuffer(self._keys[row].ljust(self._keys.itemsize, b"\0"), ">f4").tolist())
        return [next(told) if one is None else float(one[row]) for one in self._alike]

    def _lay_out(self, snapshot: Snapshot, ask: Ask, mix: Mix, moved: Rows) -> None:
        """Take in what Node objects say, and scores that are the same everywhere for this kind of ask."""
        self._checks = [(at, MASKS[name]) for at, name in self._live if ask.kind in asks_of(name)]
        self._tiers = tuple(
            tier for tier in self.policies.tiers if any(ask.kind in told_apart_by(name) for name, _ in tier)
        )
        names = [name for tier in self.policies.tiers for name, _ in tier]
        static = [name for name in names if name in STATIC_SCORES or ask.kind not in told_apart_by(name)]
        self._known = {name: SCORES[name](snapshot, ask, mix) for name in static}
        self._alike = [
            None if tier in self._tiers else combine.tier_sum([(weight, self._known[name]) for name, weight in tier])
            for tier in self.policies.tiers
        ]
        settled = {
            at: combine.tier_sum([(weight, self._known[name]) for name, weight in tier])
            for at, tier in enumerate(self._tiers)
            if all(name in self._known for name, _ in tier)
        }
        self._leading = [settled[at] for at in takewhile(settled.__contains__, range(len(self._tiers)))]
        failed = judge(snapshot, ask, mix, self.policies, self._static).failed.first
        last = np.full(snapshot.nodes, _LAST, np.uint32)
        self._ceilings = self._written(self._leading, last, failed < 0)
        self._keep(snapshot, failed, settled, moved)

    def _keep(
        self, snapshot: Snapshot, failed: npt.NDArray[np.int8], settled: dict[int, FloatArray], moved: Rows
    ) -> None:
        """Keep what was judged of nodes that have not changed themselves, with their new rank and settled sums."""
        keys, first = self._keys, self._first
        same = np.zeros(snapshot.nodes, np.bool_)
        same[: len(keys)] = ~self._stale
        same[moved] = False
        same &= failed < 0
        if any(name in self._known and at not in settled for at, tier in enumerate(self._tiers) for name, _ in tier):
            same[:] = False
        kept = np.flatnonzero(same)
        self._keys, self._first = self._ceilings.copy(), failed.copy()
        self._stale = ~same & (failed < 0)
        if not len(kept):
            return
        self._keys[kept], self._first[kept] = keys[kept], first[kept]
        kept = kept[keys[kept] != b""]
        raw = self._keys.view(">u4").reshape(snapshot.nodes, -1)
        for at, one in settled.items():
            raw.view(">f4")[kept, at] = one[kept]
        raw[kept, len(self._tiers)] = _LAST - snapshot.rank[kept].astype(np.int64)

    def _doubt(self, rows: Rows) -> None:
        """Fall back to what Node objects say of these nodes."""
        self._keys[rows] = ceilings = self._ceilings[rows]
        self._stale[rows] = ceilings != b""

    def _mend(self, keys: Keys, rows: Rows, count: int) -> None:
        """Judge the stale ones among `rows` that may be among the best, and write into `keys` what they are worth."""
        stale = np.flatnonzero(self._stale.take(rows))
        ceilings = keys.take(stale)
        keys[stale] = b""
        top = _top(keys, count)
        floor = keys[top[-1]] if len(top) == count else b""
        due = stale[ceilings > floor]
        if len(due) >= BOUNDED_FROM and floor:
            due = due[self._bounds(rows.take(due)) > floor]
        if len(due):
            self._judge(rows.take(due))
            keys[due] = self._keys.take(rows.take(due))

    def _bounds(self, rows: Rows) -> Keys:
        """Return what these nodes may be worth at most, by the first tier that changes with what is booked."""
        near, leading = Near(self._snapshot, rows), len(self._leading)
        sums = [one.take(rows) for one in self._leading]
        sums += [self._sum(tier, near, self.ask, rows) for tier in self._tiers[leading : leading + 1]]
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
        sums = [self._sum(tier, near, ask, rows) for tier in self._tiers]
        last = _LAST - self._snapshot.rank.take(rows).astype(np.int64)
        self._keys[rows] = self._written(sums, last, passes)
        self._first[rows] = first
        self._stale[rows] = False

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
        words = len(self._tiers) + 1
        raw = np.zeros((len(last), words + words % 2), ">u4")  # whole 8 bytes, see `_top`
        raw[:, len(sums) : words - 1] = _LAST
        floats = raw.view(">f4")
        for at, one in enumerate(sums):
            floats[:, at] = one
        raw[:, words - 1] = last
        keys = raw.view(f"S{4 * raw.shape[1]}")[:, 0]
        if passes is not None:
            keys[~passes] = b""
        return keys


def _top(keys: Keys, count: int) -> Rows:
    """Return where the `count` largest keys are, largest first; fewer where there are no more that pass."""
    if count == 1:
        return np.asarray([keys.argmax()], np.intp)
    if count <= FEW:
        return _few(keys.copy(), count)
    if len(keys) < 4 * count:
        return keys.argsort()[::-1][:count]
    heads = keys.view(">u8").reshape(len(keys), -1)[:, 0].astype(np.uint64)
    some = np.flatnonzero(heads >= np.partition(heads, -count)[-count])
    return some[keys[some].argsort()[::-1][:count]]


def _few(keys: Keys, count: int) -> Rows:
    """Return the same by one look at all keys for each; they are crossed out."""
    found: list[np.intp] = []
    while len(found) < count and keys[at := keys.argmax()]:
        found.append(at)
        keys[at] = b""
    return np.asarray(found, np.intp)


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
