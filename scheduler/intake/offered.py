"""The long list of node names at the end of a request, found in the bytes and left there.

kube-scheduler writes the names last, each between plain quotes. To make a string of each costs more than to decide
among them, and hardly any of them is ever read as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

KEY = b',"NodeNames":'
OPENING, CLOSED = KEY + b"[", KEY + b"null}"
BETWEEN = b'","'
BYTES_MIN = 12_288
"""Shorter lists are sooner read as they are: about 250 names of 45 bytes."""


@dataclass(slots=True, eq=False)
class Offered(Sequence[str]):
    """Names as kube-scheduler wrote them; one becomes a string when it is asked for.

    Attributes:
        raw: the names in quotes, one comma between two of them: ASCII without control characters, nothing escaped.
        starts: where each name begins in `raw`, behind its quote.
        lengths: bytes of each name, 0..
    """

    raw: bytes
    starts: npt.NDArray[np.intp]
    lengths: npt.NDArray[np.intp]

    def __len__(self) -> int:
        """Return how many were offered."""
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or some of them as a list."""
        if isinstance(index, slice):
            return list(self)[index]
        start = int(self.starts[index])
        return self.raw[start : start + int(self.lengths[index])].decode("ascii")

    def __iter__(self) -> Iterator[str]:
        """Read all names, in the order in which they came."""
        return iter(self.raw[1:-1].decode("ascii").split('","'))


def part(body: bytes) -> tuple[bytes, Offered] | None:
    """Part a request into what stands before its names, closed with null in their place, and the names.

    The whole is JSON if and only if the first part is, and says the same but for the names: the names stand behind
    the last key of the outermost object.

    Args:
        body: as it came.

    Returns:
        None when the names are few, do not stand last, or are written in another way than kube-scheduler does.
    """
    at = body.find(OPENING)
    if at < 0 or len(body) - at < BYTES_MIN or not body.endswith(b'"]}'):
        return None
    raw = body[at + len(OPENING) : -2]
    if not raw.startswith(b'"') or b"\\" in raw or not raw.isascii():
        return None
    # What may not stand between quotes, and what no node is called, is below the quote: it counts as one and is found.
    marks = (np.frombuffer(raw, np.uint8) <= ord('"')).nonzero()[0]
    opens, closes = marks[::2], marks[1::2]
    if len(opens) != len(closes):
        return None
    threes = np.ndarray((len(raw) - 2,), "V3", raw, 0, (1,))  # one begins at every byte
    if threes[closes[:-1]].tobytes() != BETWEEN * (len(opens) - 1):
        return None
    starts = opens + 1
    return body[:at] + CLOSED, Offered(raw, starts, closes - starts)
