"""`tessera ledger`: check the journal and write it out, beside a running Tessera or without one."""

from __future__ import annotations

import sys
from typing import Annotated

import orjson
import typer

from scheduler.errors import TesseraError
from scheduler.store.store import Store

from .places import default_url

app = typer.Typer(name="ledger", help="Check and export the ledger's journal.", no_args_is_help=True)

Url = Annotated[str, typer.Option("--db", help="sqlite:///FILE or postgresql://HOST/NAME; default: as `serve`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def verify(db: Url = "", *, as_json: AsJson = False) -> None:
    """Check every line's hash and transition, and that rows and accounts agree with them."""
    summary, text = _verify(db or default_url())
    if as_json:
        sys.stdout.write(orjson.dumps(summary).decode() + "\n")
    elif summary["ok"]:
        sys.stdout.write(f"The journal is good: {summary['rows']} lines, head {summary['head']}.\n")
    if text:
        sys.stderr.write(text + "\n")
    raise typer.Exit(0 if summary["ok"] else 1)


def _verify(db: str) -> tuple[dict[str, object], str]:
    try:
        with Store.read(db) as store:
            found = store.verify()
    except TesseraError as error:
        return _summary(0, None, ok=False, first_bad=None) | {"code": error.code}, str(error)
    return _summary(found.rows, found.head, ok=found.ok, first_bad=found.first_bad), found.text


def _summary(rows: int, head: str | None, *, ok: bool, first_bad: int | None) -> dict[str, object]:
    return {"rows": rows, "ok": ok, "first_bad": first_bad, "head": head, "seed": None}


@app.command()
def export(db: Url = "") -> None:
    """Write the journal to stdout, one JSON object a line, exactly as it was hashed."""
    try:
        with Store.read(db or default_url()) as store:
            for line in store.journal():
                sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_SORT_KEYS) + b"\n")
            sys.stdout.buffer.flush()
    except TesseraError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(1) from None
