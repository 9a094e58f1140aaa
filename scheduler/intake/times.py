"""Durations and instants as Kubernetes and people write them, as whole numbers."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

RUNTIME_MAX_S = 100 * 365 * 86_400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PIECE = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?(ms|us|ns|[dhms])")
_NANOS = {"d": 86_400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def seconds(written: str) -> int | None:
    """Return a duration such as `90s`, `8h`, `1h30m`, `1.5h` or `2d`, rounded up to whole seconds.

    Returns:
        1 to 100 years in seconds; None where the text is no such duration.
    """
    pieces = list(_PIECE.finditer(written))
    if not pieces or "".join(piece[0] for piece in pieces) != written or len(pieces) > len(_NANOS):
        return None
    nanos = 0
    for piece in pieces:
        part = piece[2] or ""
        nanos += -(-int(piece[1] + part) * _NANOS[piece[3]] // 10 ** len(part))
    total = -(-nanos // 10**9)
    return total if 0 < total <= RUNTIME_MAX_S else None


def micros(written: str) -> int | None:
    """Return an RFC 3339 instant in microseconds since 1970, or None where the text is none."""
    if _INSTANT.fullmatch(written) is None:
        return None
    try:
        instant = datetime.fromisoformat(written.upper())
        return (instant - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None
