"""The file in which a MIG change is announced before it begins and closed when it is over.

One line is one record: a checksum, a space, JSON. A record is on the disk before its method returns. Invariant: what
the file says is what `open` and `settled` say, also when the process dies between any two instructions; a last line
that was cut off was never said, and a file with a wrong line before its last is not guessed at.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

CREATE, DESTROY, MODE_ON, MODE_OFF = KINDS = ("create", "destroy", "mode_on", "mode_off")
_LINES_MAX = 256
_BYTES_MAX = 1 << 20
_CHECKSUM = 8


class JournalError(Exception):
    """The journal cannot be read or written; the message is a sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one device: an instance of a profile at a start, made or destroyed, or the MIG mode."""

    device: str
    kind: str
    profile: str = ""
    start: int = 0

    def __str__(self) -> str:
        """Say it in a few words."""
        what = f"{self.profile} at {self.start}" if self.profile else "MIG mode"
        return f"{self.kind.replace('_', ' ')}: {what} on {self.device}"


class Journal:
    """Changes that began and were not closed, by device; and in which start of the machine a device was settled."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet; the folder must exist."""
        self.open: dict[str, tuple[Change, str]] = {}
        """Device -> the change, and the boot id it began in."""
        self.settled: dict[str, str] = {}
        """Device -> the boot id in which it last had what it should."""
        self._path, self._lines, self._whole = path, 0, False

    def load(self) -> None:
        """Read the file, and write it anew without what is over. Raises JournalError."""
        try:
            if self._path.exists():
                if self._path.stat().st_size > _BYTES_MAX:
                    raise JournalError(f"{self._path} has more than {_BYTES_MAX} bytes: not written by this program.")
                self._read(self._path.read_bytes())
            self._rewrite()
        except OSError as error:
            raise JournalError(f"{self._path} cannot be used ({error}); make its folder writable.") from error

    def started(self, change: Change, boot: str) -> None:
        """Announce a change. Raises JournalError: nothing may be done then."""
        assert change.device not in self.open
        self._write({"event": "started", "boot": boot, "change": asdict(change)})

    def ended(self, device: str, how: str) -> None:
        """Close the device's change: `completed` or `undone`. Raises JournalError: it is still open then."""
        self._write({"event": how, "device": device})

    def settle(self, device: str, boot: str) -> None:
        """Note that the device has what it should since this start of the machine. Raises JournalError."""
        if self.settled.get(device) != boot:
            self._write({"event": "settled", "device": device, "boot": boot})

    def _read(self, body: bytes) -> None:
        lines = body.splitlines()
        for at, line in enumerate(lines):
            try:
                self._take(_parsed(line))
            except (ValueError, LookupError, TypeError) as error:
                if at == len(lines) - 1:
                    return  # cut off while it was written, so nothing was done upon it
                raise JournalError(
                    f"line {at + 1} of {self._path} is damaged ({error}); compare the MIG instances of this machine "
                    "with what they should be, then move the file away."
                ) from error

    def _take(self, record: dict[str, Any]) -> None:
        match record["event"]:
            case "started":
                change = Change(**record["change"])
                self.open[change.device] = change, record["boot"]
            case "completed" | "undone":
                self.open.pop(record["device"], None)
            case "settled":
                self.settled[record["device"]] = record["boot"]
            case other:
                raise ValueError(f"no such event: {other}")

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record; after a failure the file may end anyhow, so the next one writes all of it anew."""
        try:
            if not self._whole or self._lines >= _LINES_MAX:
                self._rewrite()
            self._whole = False
            with self._path.open("ab") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(f"{self._path} cannot be written ({error}); make room for it.") from error
        self._whole, self._lines = True, self._lines + 1
        self._take(record)

    def _rewrite(self) -> None:
        records: list[dict[str, Any]] = [
            {"event": "settled", "device": device, "boot": boot} for device, boot in self.settled.items()
        ]
        records += [{"event": "started", "boot": boot, "change": asdict(change)} for change, boot in self.open.values()]
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("wb") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)  # noqa: PTH105 - as the other calls that reach the disk
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)
        self._whole, self._lines = True, len(records)


def _line(record: dict[str, Any]) -> bytes:
    body = orjson.dumps(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parsed(line: bytes) -> dict[str, Any]:
    body = line[_CHECKSUM + 1 :]
    if line[:_CHECKSUM] != b"%08x" % zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    record = orjson.loads(body)
    if not isinstance(record, dict):
        raise TypeError("it is no object")
    return record
