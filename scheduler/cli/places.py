"""Where the ledger lives unless --db says otherwise: the same for the process that writes it and for those who read."""

from __future__ import annotations

import os
from pathlib import Path

from scheduler.errors import ConfigError


def state_folder() -> Path:
    """Return $TESSERA_STATE, else $XDG_STATE_HOME/tessera, else ~/.local/state/tessera; it need not exist."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(os.environ.get("TESSERA_STATE") or f"{home}/tessera")


def default_url() -> str:
    """Return the URL of the ledger in the state folder."""
    return f"sqlite:///{state_folder().absolute() / 'ledger.db'}"


def make_state_folder() -> None:
    """Make the state folder, readable by its owner alone.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = state_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot make the state folder {folder}: {error.strerror}; set TESSERA_STATE to a folder, or name a --db"
        ) from error
