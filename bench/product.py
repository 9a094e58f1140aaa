"""The product as an operator runs it: `python -m scheduler serve`, one process at a time on one database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.child import Child
from bench.errors import BenchError
from scheduler.clock import RealClock

CLOCK = RealClock()
READY_S = 90.0
_POLL_S = 0.02


class ProductError(BenchError):
    """Tessera did not start, ended by itself, or a command of it failed; the sentence holds the log's end."""


class Product:
    """Tessera's process and its database; each start is a new process with a log of its own.

    Attributes:
        db: the database URL, the same for every start.
        extender: urlPrefix of the running process, empty before the first start; `api` likewise for people.
        webhook: what kube-apiserver calls, empty when it was not asked for; `agents` likewise for node agents.
        ready_s: seconds from each start to its ready line.
    """

    def __init__(self, folder: Path, kubeconfig: Path | None, *, flags: Sequence[str] = ()) -> None:
        """Note where it keeps its state, as whom it acts and what else `serve` is told; nothing is started.

        Without a kubeconfig the flags must say which cluster it serves.
        """
        self._flags = flags
        self._folder = folder
        self._kubeconfig = kubeconfig
        self._child: Child | None = None
        self.db = f"sqlite:///{folder / 'tessera.db'}"
        self.extender = self.api = self.webhook = self.agents = ""
        self.ready_s: list[float] = []

    async def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait for its ready line.

        Args:
            environment: more variables, for this start alone.

        Raises:
            ProductError: it ended, or was not ready in time.
        """
        log = self._folder / f"tessera-{len(self.ready_s)}.log"
        begun = time.monotonic()
        listeners = [f"--{name}=127.0.0.1:0" for name in ("extender", "api", "metrics")]
        acting = [f"--kubeconfig={self._kubeconfig}"] if self._kubeconfig else []
        argv = [*_COMMAND, "serve", *acting, f"--db={self.db}", *listeners, *self._flags]
        env = {**os.environ, "TESSERA_STATE": str(self._folder), **(environment or {})}
        child = self._child = Child("Tessera", argv, log, env)
        while (line := _ready_line(log)) is None:
            if not child.alive:
                raise ProductError(f"Tessera ended while starting; the end of {log}:\n{child.tail()}")
            if time.monotonic() - begun > READY_S:
                raise ProductError(f"Tessera not ready after {READY_S:.0f} s; the end of {log}:\n{child.tail()}")
            await CLOCK.sleep(_POLL_S)
        self.ready_s.append(time.monotonic() - begun)
        self.extender, self.api, self.webhook = str(line["extender"]), str(line["api"]), str(line["webhook"] or "")
        self.agents = str(line["agents"] or "")

    @property
    def pid(self) -> int:
        """The process id of the running process.

        Raises:
            ProductError: none runs.
        """
        if self._child is None:
            raise ProductError("Tessera does not run")
        return self._child.pid

    @property
    def log(self) -> Path:
        """The log of the last start."""
        return self._folder / f"tessera-{len(self.ready_s) - 1}.log"

    def check(self) -> None:
        """Make sure that it still runs.

        Raises:
            ProductError: it ended though nobody killed it.
        """
        if self._child and not self._child.alive:
            raise ProductError(f"Tessera ended by itself; the end of {self._child.log}:\n{self._child.tail()}")

    async def died(self, timeout_s: float) -> bool:
        """Wait until it has died of SIGKILL, and say whether it did.

        Raises:
            ProductError: it ended in another way.
        """
        assert self._child is not None
        status = await self._child.ended(timeout_s)
        if status not in {None, -signal.SIGKILL}:
            self.check()
        return status is not None

    async def kill(self) -> None:
        """SIGKILL it and wait until it is gone; nothing happens when it does not run."""
        child, self._child = self._child, None
        if child:
            await child.kill()

    async def stop(self) -> int:
        """Ask it to end and return its exit status: 0 when it went in good order, negative when it was killed."""
        child, self._child = self._child, None
        return await child.stop(timeout_s=10) if child else 0

    async def export_journal(self, path: Path) -> None:
        """Write `tessera ledger export` to a file.

        Raises:
            ProductError: the command failed.
        """
        with path.open("wb") as out:
            command = await asyncio.create_subprocess_exec(
                *_COMMAND, "ledger", "export", "--db", self.db, stdout=out, stderr=asyncio.subprocess.PIPE
            )
            _, said = await command.communicate()
        if command.returncode:
            raise ProductError(f"tessera ledger export failed ({command.returncode}): {said.decode(errors='replace')}")


_COMMAND = [sys.executable, "-m", "scheduler"]


def _ready_line(log: Path) -> dict[str, Any] | None:
    """Return the ready line when it is there in full."""
    for line in log.read_text(errors="replace").split("\n")[:-1]:
        if line.startswith('{"ready"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return None
