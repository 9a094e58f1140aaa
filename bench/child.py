"""A child process that cannot outlive this one: its log in a file, its end by signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Child:
    """One running program.

    The kernel kills it when the thread that started it ends (`setpriv --pdeathsig`, util-linux), so start it from a
    thread that lives as long as the program should: the main one.
    """

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Start it.

        Args:
            name: what errors call it.
            argv: program and arguments.
            log: file its stdout and stderr are appended to.
            env: the whole environment; this process's by default.
        """
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],  # noqa: S607  # util-linux, part of every distribution
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def tail(self, lines: int = 20) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def send(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP and SIGCONT to pause it; no error when it has ended."""
        self._process.send_signal(number)

    async def ended(self, timeout_s: float) -> int | None:
        """Wait until it ends by itself and return its exit status (negative: the signal), None when it does not."""
        try:
            return await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return None

    async def stop(self, *, timeout_s: float = 20.0) -> int:
        """Ask it to end, kill it when it does not in time; return its exit status (negative: the signal)."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, timeout_s)
        return await self.kill()

    async def kill(self) -> int:
        """SIGKILL it and wait until it is gone; return its exit status."""
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)
