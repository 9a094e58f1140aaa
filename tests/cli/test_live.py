"""`tessera top` on a terminal: it draws, and Ctrl-C ends it in good order."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from pathlib import Path

from tests.cli.stage import Stage

ROOT = Path(__file__).resolve().parents[2]


def drawn(terminal: int, wanted: bytes) -> bytes:
    """Read what a terminal shows until something is there."""
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 65536)
    return seen


def heed_interrupts() -> None:
    """Undo what a shell does to jobs in the background, in case these tests are one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


async def test_top_is_live_until_it_is_interrupted() -> None:
    stage = Stage()
    stage.bound("one", "exact-1", 2)
    terminal, theirs = pty.openpty()
    async with stage.serving(), asyncio.timeout(60):
        command = [sys.executable, "-m", "scheduler", "top", "--api", stage.url]
        environment = {**os.environ, "COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
        theirs_all = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        top = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, preexec_fn=heed_interrupts, **theirs_all
        )
        os.close(theirs)
        seen = await asyncio.to_thread(drawn, terminal, b"##......")
        assert b"\x1b[?1049h" in seen  # a screen of its own
        top.send_signal(signal.SIGINT)
        assert b"\x1b[?1049l" in await asyncio.to_thread(drawn, terminal, b"\x1b[?1049l")
        assert await top.wait() == 0
    os.close(terminal)
