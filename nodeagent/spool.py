"""Reports kept on disk while Tessera cannot be reached: bounded in size and age, oldest dropped first.

A record is length, CRC and time, then the compressed report. Each process writes files of its own, so that a torn end
is always the end of a file; what is behind a broken record in its file is not read. Invariant: no disk that is full,
slow or broken ends the agent: a record that cannot be kept is lost and counted.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nodeagent.report import BYTES_MAX

SIZE_MAX, AGE_US = 16 << 20, 3_600_000_000
SYNC_US = 30_000_000
"""A machine that loses power loses at most this much of its past; what matters of the present is sent anew anyway."""

_PARTS = 8
_HEAD = struct.Struct("<IIQ")
_NAME = re.compile(r"[0-9]{12}\.spool")


@dataclass(slots=True)
class _File:
    path: Path
    size: int
    newest_us: int


class Spool:
    """A queue of encoded reports in one folder, which nobody else may use."""

    def __init__(
        self, folder: Path, *, size_max: int = SIZE_MAX, age_us: int = AGE_US, sync: Callable[[int], None] = os.fsync
    ) -> None:
        """Find what an earlier process left. Raises OSError when the folder cannot be made or read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size_max, self._age_us, self._sync = folder, size_max, age_us, sync
        found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
        self._files = [_File(path, path.stat().st_size, int(path.stat().st_mtime * 1_000_000)) for path in found]
        self._next = int(found[-1].stem) + 1 if found else 0
        self._writing: BinaryIO | None = None
        self._synced_us = 0
        self._at = 0  # offset in the first file of what is read next
        self._length = 0  # of the record that was read last and is not done
        self.lost = 0

    def put(self, at_us: int, report: bytes) -> bool:
        """Keep a report; False when it could not be kept."""
        packed = zlib.compress(report, 1)
        record = _HEAD.pack(len(packed), zlib.crc32(packed), at_us) + packed
        try:
            if self._writing is None or self._files[-1].size + len(record) > self._size_max // _PARTS:
                self._begin(at_us)
            assert self._writing is not None
            self._writing.write(record)
            self._writing.flush()
            if at_us - self._synced_us >= SYNC_US:
                self._sync(self._writing.fileno())
                self._synced_us = at_us
        except OSError:
            self.lost += 1
            self._end()
            return False
        self._files[-1].size += len(record)
        self._files[-1].newest_us = at_us
        self._drop(at_us)
        return True

    def peek(self) -> bytes | None:
        """Return the oldest report, None where there is none."""
        while self._files:
            report = self._read(self._files[0])
            if report is not None:
                return report
            self._remove()
        return None

    def done(self) -> None:
        """Let go of the report that `peek` returned last, if it is still there."""
        self._at, self._length = self._at + self._length, 0

    def close(self) -> None:
        """Make sure that what is kept stays."""
        self._end()

    def _read(self, file: _File) -> bytes | None:
        """Return the next report of a file, None at its end or where it is broken."""
        try:
            with file.path.open("rb") as reading:
                reading.seek(self._at)
                head = reading.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    return None
                length, crc, _ = _HEAD.unpack(head)
                packed = reading.read(length) if length <= BYTES_MAX else b""
            if len(packed) < length or zlib.crc32(packed) != crc:
                return None
            report = zlib.decompressobj().decompress(packed, BYTES_MAX)
        except (OSError, zlib.error):
            return None
        self._length = _HEAD.size + length
        return report

    def _begin(self, at_us: int) -> None:
        self._end()
        path = self._folder / f"{self._next:012}.spool"
        self._next += 1
        self._writing = path.open("xb")
        self._files.append(_File(path, 0, at_us))

    def _end(self) -> None:
        """Close the file that is written, if there is one."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with writing:
                self._sync(writing.fileno())
        except OSError:
            self.lost += 1

    def _drop(self, now_us: int) -> None:
        """Remove the oldest files while there is too much, or while all in them is too old."""
        while len(self._files) > 1 and (
            sum(file.size for file in self._files) > self._size_max
            or self._files[0].newest_us < now_us - self._age_us
        ):  # fmt: skip
            self._remove()

    def _remove(self) -> None:
        """Remove the oldest file; the next record is the first of the next one."""
        file = self._files[0]
        if len(self._files) == 1:
            self._end()
        del self._files[0]
        self._at = self._length = 0
        try:
            file.path.unlink(missing_ok=True)
        except OSError:
            self.lost += 1
