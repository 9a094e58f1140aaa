"""From node names to rows, many names at once: a hash table in arrays, for names that are still bytes of a request.

Looking up hundreds of strings in a dict waits for memory once or more for each; here the same reads are asked for all
together. Invariant: every answer is the dict's. A row is believed only where all bytes of the name are the same, and
whatever the table cannot answer (two names in one slot, unknown names, names that are not ASCII) the dict does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from scheduler.intake.offered import Offered

Words = npt.NDArray[np.uint64]

WORD = 8  # bytes
WORDS_MAX = 32  # 256 bytes; the longest legal name has 253
ROWS_MIN = 64
SLOTS_PER_ROW = 16  # at most one name in thirty finds its slot taken
NONE = -1
_FACTORS = np.cumprod(np.full(WORDS_MAX, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)  # powers of an odd number


class Roll:
    """The table. It follows its owner's dict: `put` and `drop` are noted and worked in by the next `find`.

    Memory: 68 bytes and the length of the longest name for each row, with room for up to twice the rows.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        """Start empty, beside the dict that knows every name."""
        self._rows = rows
        self._fresh: dict[int, str | None] = {}  # names of rows that changed; None = a hole
        self._words: Words = np.zeros((0, 0), np.uint64)  # [rows + 1, words], padded with zeros; the last is no name
        self._masks = self._words  # [bytes of a name, words]; the last leaves nothing of a name that is too long
        self._slots = np.zeros(0, np.int32)  # row of the name whose hash this is
        self._slot = np.zeros(0, np.int32)  # of each row
        self._factors, self._shift = _FACTORS[:0], np.uint64(0)  # of the hash: multilinear, its top bits

    def put(self, name: str, row: int) -> None:
        """Note that a name has this row from now on."""
        self._fresh[row] = name

    def drop(self, row: int) -> None:
        """Note that a row is a hole from now on."""
        self._fresh[row] = None

    def find(self, offered: Offered) -> npt.NDArray[np.intp]:
        """Return the row of each name, -1 where it is unknown."""
        self._follow()
        given = self._given(offered)
        rows = self._slots.take(self._wanted(given))
        others = (self._words.take(rows, axis=0) != given).ravel().nonzero()[0] // given.shape[1]
        for index in dict.fromkeys(others.tolist()):
            rows[index] = self._rows.get(offered[index], NONE)
        return rows.astype(np.intp)

    def _given(self, offered: Offered) -> Words:
        """Return the names as words, padded with zeros."""
        width = self._words.shape[1] * WORD
        padded = offered.raw + bytes(width)
        windows = np.ndarray((len(offered.raw),), f"V{width}", padded, 0, (1,))  # one begins at every byte
        words: Words = windows[offered.starts].view(np.uint64).reshape(-1, width // WORD)
        words &= self._masks.take(offered.lengths, axis=0, mode="clip")
        return words

    def _wanted(self, words: Words) -> npt.NDArray[np.uint64]:
        """Return the slot of each name: the top bits of a multilinear hash."""
        slots: npt.NDArray[np.uint64] = words @ self._factors
        slots >>= self._shift
        return slots

    def _follow(self) -> None:
        """Work in what was noted."""
        if not self._fresh and len(self._slots):
            return
        longest = max((len(name) for name in self._fresh.values() if name and _plain(name)), default=0)
        if max(self._fresh, default=0) >= len(self._slot) or longest > self._words.shape[1] * WORD:
            self._make_room(max(self._fresh, default=0), longest)
            self._lay({row: name for name, row in self._rows.items()})
        else:
            self._lay(self._fresh)
        self._fresh = {}

    def _make_room(self, row: int, longest: int) -> None:
        """Empty the table, with room for this row and for names of this many bytes."""
        rows = max(ROWS_MIN, len(self._slot), 1 << row.bit_length())
        words = max(1, self._words.shape[1], -(-longest // WORD))
        self._words = np.zeros((rows + 1, words), np.uint64)
        self._words[NONE] = np.iinfo(np.uint64).max
        shown = np.arange(words * WORD) < np.arange(words * WORD + 2)[:, None]
        shown[-1] = False
        self._masks = (shown * np.uint8(0xFF)).view(np.uint64)
        self._factors = _FACTORS[:words]
        self._shift = np.uint64(65 - (rows * SLOTS_PER_ROW).bit_length())
        self._slots = np.full(rows * SLOTS_PER_ROW, NONE, np.int32)
        self._slot = np.full(rows, NONE, np.int32)

    def _lay(self, names: Mapping[int, str | None]) -> None:
        """Empty the slots of these rows, then give each name its slot, if no other has it."""
        if not names:
            return
        rows = np.fromiter(names, np.int32, len(names))
        before = self._slot[rows]
        self._slots[before[before >= 0]] = NONE
        plain = {row: name for row, name in names.items() if name is not None and _plain(name)}
        self._slot[rows] = NONE
        rows = np.fromiter(plain, np.int32, len(plain))
        padded = np.array(list(plain.values()), f"S{self._words.shape[1] * WORD}")
        words = self._words[rows] = padded.view(np.uint64).reshape(-1, self._words.shape[1])
        wanted = self._wanted(words).astype(np.int32)
        free = self._slots[wanted] < 0
        self._slots[wanted[free]] = rows[free]
        mine = self._slots[wanted] == rows
        self._slot[rows[mine]] = wanted[mine]


def _plain(name: str) -> bool:
    """Say whether the table may hold a name: with zeros at its end, or empty, it would look like another."""
    return bool(name) and name.isascii() and "\0" not in name and len(name) <= WORDS_MAX * WORD
