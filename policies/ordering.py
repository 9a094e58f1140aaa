"""Who is next: queues by whether they would borrow, their share and their name; requests by priority and age.

A share is the dominant key's decayed usage over what the queue is entitled to, divided by its weight. Decayed usage is
an average of what was held, in which what is one half-life older counts half as much: a queue that holds 8 for long
comes to 8, and back to 4 one half-life after it let go. Everything is a whole number, so the same past gives the same
order on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TypeAlias

MICRO = 1_000_000
"""Decayed usage is kept in millionths of the key's unit."""

_ONE = 1 << 62
_BITS = 24  # of the part of a half-life that is told apart: 5 ms of a day


def _roots() -> list[int]:
    """Return 2^-1/2, 2^-1/4, 2^-1/8, ... of `_ONE`."""
    roots = [isqrt(_ONE * _ONE // 2)]
    while len(roots) < _BITS:
        roots.append(isqrt(roots[-1] * _ONE))
    return roots


_ROOTS = _roots()

QueueRank: TypeAlias = tuple[bool, int, str]
RequestRank: TypeAlias = tuple[int, int, str, str]


def decayed(before: int, rate: int, elapsed_us: int, half_life_us: int) -> int:
    """Return the decayed usage after a while in which `rate` was held.

    Args:
        before: the decayed usage at the start, in millionths, 0 or more.
        rate: what was held all the while, in whole units, 0 or more.
        elapsed_us: how long, in microseconds; a clock that went back counts as no time.
        half_life_us: more than 0.

    Returns:
        Millionths, between `before` and `rate` x 1,000,000.
    """
    kept = _half_to_the(max(elapsed_us, 0), half_life_us)
    return (before * kept + rate * MICRO * (_ONE - kept)) // _ONE


def _half_to_the(elapsed_us: int, half_life_us: int) -> int:
    """Return 2^-(elapsed / half-life) of `_ONE`."""
    whole, rest = divmod(elapsed_us, half_life_us)
    if whole > _ONE.bit_length():
        return 0
    part, kept = (rest << _BITS) // half_life_us, _ONE
    for place, root in enumerate(_ROOTS, start=1):
        if part >> (_BITS - place) & 1:
            kept = kept * root // _ONE
    return kept >> whole


def share_milli(used: Mapping[str, int], entitled: Mapping[str, int], weight: int) -> int:
    """Return a queue's share in thousandths: of the key of which it used most for what it is entitled to.

    Args:
        used: decayed usage by key, in millionths; what was granted since may be added, in millionths too.
        entitled: by key, in whole units; keys that are absent do not count, and 0 counts as 1.
        weight: 1 or more.
    """
    return max(
        (1000 * used[key] // (max(entitled[key], 1) * MICRO * weight) for key in used if key in entitled), default=0
    )


def queue_rank(*, borrows: bool, share: int, name: str) -> QueueRank:
    """Return what queues are sorted by, the next one first: those that stay within their own before those that borrow.

    Args:
        borrows: granting the head of its line would make it borrow.
        share: its `share_milli`.
        name: breaks ties.
    """
    return borrows, share, name


def request_rank(*, priority: int, arrival_us: int, namespace: str, name: str) -> RequestRank:
    """Return what the requests of one queue are sorted by, the next one first: priority, then age, then the name."""
    return -priority, arrival_us, namespace, name
