"""Entry point of `tessera` and `python -m scheduler`."""

from __future__ import annotations

import sys

import typer

from scheduler.cli.main import app
from scheduler.errors import TesseraError

USAGE = 64


def main() -> None:
    """Run the command line: exit 0 = done, 1 = failed, 64 = usage."""
    if not __debug__:
        sys.exit("tessera: refused under python -O: its assertions guard the ledger; start it without -O")
    try:
        code = app(standalone_mode=False, prog_name="tessera")
    except typer.Exit as done:
        code = done.exit_code
    except typer.Abort:
        code = 1
    except TesseraError as error:
        sys.stderr.write(f"tessera: {error} [{error.code}]\n")
        code = 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if said := error.format_message():  # empty when no command was given and the help was shown
            context = getattr(error, "ctx", None)
            sys.stderr.write(f"tessera: {said}\nTry: {context.command_path if context else 'tessera'} --help\n")
        code = USAGE
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
