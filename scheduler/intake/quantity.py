"""Kubernetes quantities as exact integers: `500m`, `4`, `8Gi`, `1.5e3`.

Invariant: no floating point; what is finer than the unit asked for is rounded away from zero, as Kubernetes does.
"""

from __future__ import annotations

import re
from functools import lru_cache

from scheduler.model.pod import AMOUNT_MAX

from .reading import shown

NANO = 10**9
_TEXT_MAX = 64
_FORM = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)(?:\.(?P<part>[0-9]*))?|\.(?P<bare>[0-9]+))"
    r"(?:(?P<decimal>[numkMGTPE])|(?P<binary>[KMGTPE])i|[eE](?P<exponent>[+-]?[0-9]{1,2}))?"
)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


class QuantityError(ValueError):
    """Not a quantity, or one too large; the sentence says what to write."""


def nano(value: object) -> int:
    """Return a quantity in billionths, rounded away from zero.

    Args:
        value: the text, or a JSON number; null is 0, as for Kubernetes.

    Raises:
        QuantityError: it cannot be read, or is beyond 2^62 units.
    """
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise QuantityError(f"{shown(value)} is no quantity; write one such as 500m, 4 or 8Gi.")
    if isinstance(value, int):
        return _bounded(value * NANO, value)
    return _parsed(value if isinstance(value, str) else repr(value))


def milli(value: object) -> int:
    """Return a quantity in thousandths, rounded away from zero, at most 2^62 in size. Raises QuantityError."""
    thousandths = rounded(nano(value), NANO // 1000)
    if abs(thousandths) > AMOUNT_MAX:
        raise QuantityError(f"quantity {shown(value)} is too large; ask for less.")
    return thousandths


def whole(value: object) -> int:
    """Return a quantity in whole units, rounded away from zero, at most 2^62 in size. Raises QuantityError."""
    return rounded(nano(value), NANO)


def rounded(amount: int, unit: int) -> int:
    """Return amount / unit, rounded away from zero."""
    size = -(-abs(amount) // unit)
    return size if amount >= 0 else -size


@lru_cache(maxsize=4096)
def _parsed(written: str) -> int:
    """Return billionths; pods write the same few texts, so the answers are kept."""
    found = _FORM.fullmatch(written.strip()) if len(written) <= _TEXT_MAX else None
    if found is None:
        raise QuantityError(f"quantity {shown(written)} cannot be read; write one such as 500m, 4 or 8Gi.")
    part = found["bare"] or found["part"] or ""
    digits = int((found["whole"] or "") + part)
    exponent = 9 - len(part) + (_DECIMAL[found["decimal"]] if found["decimal"] else int(found["exponent"] or 0))
    digits <<= _BINARY[found["binary"]] if found["binary"] else 0
    size = digits * 10**exponent if exponent >= 0 else -(-digits // 10**-exponent)
    return _bounded(-size if found["sign"] == "-" else size, written)


def _bounded(amount: int, value: object) -> int:
    if abs(amount) > AMOUNT_MAX * NANO:
        raise QuantityError(f"quantity {shown(value)} is too large; ask for less.")
    return amount
