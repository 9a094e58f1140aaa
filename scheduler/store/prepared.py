"""Statements that every commit runs, compiled once: the driver gets text and values, and nothing is built anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.sql.compiler import SQLCompiler


class Prepared:
    """One INSERT or UPDATE in one database's own words."""

    def __init__(self, statement: sa.Insert | sa.Update, dialect: sa.Dialect) -> None:
        """Compile it; values go to the driver as they are, so they must be integers, text or None."""
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        assert isinstance(dialect, DefaultDialect)
        assert not compiled._bind_processors, "a value that the driver does not take as it is"  # noqa: SLF001
        self._text = str(compiled)
        self._names = compiled.positiontup

    def run(self, connection: sa.Connection, given: Sequence[Mapping[str, Any]]) -> int:
        """Run it once for each of these values, by name; return how many rows were met in all."""
        names = self._names
        values = (
            [dict(one) for one in given] if names is None else [tuple(map(one.__getitem__, names)) for one in given]
        )
        return connection.exec_driver_sql(self._text, values).rowcount
