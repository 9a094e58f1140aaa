"""Some nodes of a snapshot, for those who have no need of the others."""

from __future__ import annotations

from policies.columns import COLUMN_DTYPES, Snapshot

from .combine import Rows


class Near(Snapshot):
    """Some rows of a snapshot; a column is gathered when it is first read, so use it up before the columns change."""

    __slots__ = ("_rows", "_whole", "made")

    def __init__(self, whole: Snapshot, rows: Rows | slice) -> None:
        """Note which rows; nothing is gathered."""
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "made", {})  # what policies have derived from these rows, for one ask

    def __getattr__(self, name: str) -> object:
        if name not in COLUMN_DTYPES:
            raise AttributeError(name)
        column, rows = getattr(self._whole, name), self._rows
        column = column[..., rows] if isinstance(rows, slice) else column.take(rows, axis=-1)
        object.__setattr__(self, name, column)
        return column
