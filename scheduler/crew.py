"""The tasks that make one Tessera run: none may end by itself, for halting beats going on with half a view."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Crew(list[asyncio.Task[None]]):
    """Tasks that run until they are dismissed."""

    def __init__(self) -> None:
        """Start with nobody."""
        super().__init__()
        self._ended: list[asyncio.Task[None]] = []
        self._bell = asyncio.Event()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Let this run beside the others."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._note)
        self.append(task)

    def check(self) -> None:
        """Raise what ended one of them, if one has ended."""
        for task in self._ended:
            task.result()
            raise RuntimeError("a loop of Tessera has ended, which none should; please report it with the log")

    async def failed(self) -> None:
        """Wait until one of them has ended, then raise what ended it."""
        await self._bell.wait()
        self.check()

    async def dismiss(self) -> None:
        """Cancel all and wait until they are gone."""
        for task in self:
            task.cancel()
        await asyncio.gather(*self, return_exceptions=True)

    def _note(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._ended.append(task)
            self._bell.set()
