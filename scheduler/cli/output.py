"""What commands print: one JSON object as the last line with --json, else a table; errors as a sentence on stderr.

Colours are rich's: none without a terminal and none under NO_COLOR.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import orjson
import typer
from rich.console import Console
from rich.table import Table

from scheduler.errors import TesseraError

WIDE = 400
"""Columns of a console that is no terminal: pipes and files get whole lines."""


def say_json(body: Mapping[str, object], *, ok: bool) -> None:
    """Write the object with `seed` and `ok`, as the last line of stdout."""
    sys.stdout.write(orjson.dumps({**body, "seed": None, "ok": ok}).decode() + "\n")
    sys.stdout.flush()


@contextmanager
def reporting(*, as_json: bool) -> Generator[None, None, None]:
    """Turn an error into its sentence on stderr, the object where it was asked for, and exit status 1."""
    try:
        yield
    except TesseraError as error:
        sys.stderr.write(f"tessera: {error} [{error.code}]\n")
        if as_json:
            say_json({"code": error.code, "text": str(error)}, ok=False)
        raise typer.Exit(1) from None


def console() -> Console:
    """Return a console on stdout as it is now."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a plain table; a column whose name ends in `>` is set to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.removesuffix(">"), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def gib(size: int) -> str:
    """Return bytes as whole GiB, such as `512Gi`."""
    return f"{size // 2**30}Gi"
