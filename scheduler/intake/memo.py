"""Readings of parts that many pods share: the pods of a template ask the same, and a pod's status changes often.

Invariant: what is found is what reading again would make of it, refusal included; the key tells of every value and its
type, also of what JSON cannot write.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

from scheduler.model.pod import Refusal

from .reading import Reader

KEPT_MAX = 4096
"""Readings that one memo keeps; the oldest goes first."""

Reading = TypeVar("Reading")

_PLAIN = 2  # of marshal's formats the last one that writes equal values alike


class Memo(Generic[Reading]):
    """Remembers readings of one kind; they must be immutable."""

    def __init__(self, written_max: int = 1 << 30) -> None:
        """Remember nothing yet.

        Args:
            written_max: bytes of a part, written down, beyond which it is read each time: needed where the reading is
                as large as the part, for it stays long after its pod, and many would fill the memory.
        """
        self._written_max = written_max
        self._kept: dict[bytes, tuple[Reading, Refusal | None]] = {}

    def take(self, given: object, read: Callable[[Reader], Reading], reader: Reader) -> Reading:
        """Return what `read` makes of a part, from memory where it was read before.

        Args:
            given: all that `read` looks at; what is large, or not made of Python's plain types, is read every time.
            read: reads it, and keeps its refusal in the reader that it is given.
            reader: takes that refusal.
        """
        try:
            written = marshal.dumps(given, _PLAIN)  # type: ignore[arg-type]
        except ValueError:
            return read(reader)
        if len(written) > self._written_max:
            return read(reader)
        key = blake2b(written, digest_size=16).digest()
        found = self._kept.get(key)
        if found is None:
            own = Reader()
            found = self._kept[key] = read(own), own.refusal
            if len(self._kept) > KEPT_MAX:
                del self._kept[next(iter(self._kept))]
        reading, refusal = found
        reader.refusal = reader.refusal or refusal
        return reading
