"""An event loop in virtual time that runs what is ready in a drawn order, counts each callback and looks between two.

Real loops run callbacks in the order in which they became ready, but which became ready first is chance: a packet, a
thread, a timer. The drawn order stands for that chance, and a seed repeats it exactly.
"""

from __future__ import annotations

from asyncio import Handle
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from scheduler.clock import VirtualLoop

FAIR = 6  # a callback is overtaken by few others, so that none waits for ever


class ShuffledLoop(VirtualLoop):
    """One such loop.

    Attributes:
        steps: callbacks that were run so far.
        between: called before each callback.
    """

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self.steps = 0
        self.between: Callable[[], object] = bool
        self._ready = _Ready(self, rng)


class _Ready(deque[Handle]):
    def __init__(self, loop: ShuffledLoop, rng: Random) -> None:
        super().__init__()
        self._loop, self._draw = loop, rng.random

    def popleft(self) -> Any:
        self._loop.steps += 1
        self._loop.between()
        place = int(self._draw() * min(len(self), FAIR))
        if not place:
            return super().popleft()
        found = self[place]
        del self[place]
        return found
