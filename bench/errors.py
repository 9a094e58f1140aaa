"""What ends a bench before its figures."""

from __future__ import annotations


class BenchError(Exception):
    """The bench could not be finished; the sentence says why."""
