"""Named points at which a test may make the program fail, stall or die; in production they do nothing.

Invariant: a point's name is a literal `await fault("room.step.before")` and is listed in `POINTS`, so that a test can
collect them all from the source and demand that each is hit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from scheduler.errors import ConfigError

Hook: TypeAlias = Callable[[str], Awaitable[None]]

VARIABLE = "TESSERA_FAULT"
"""Environment variable that makes a real process die at a point: `kill:turn.commit.after:3`, at the third passing."""
POINTS = frozenset(
    {
        *("turn.commit.before", "turn.commit.after"),
        *("release.nominate.before", "release.ask.before", "release.ungate.before", "release.ungate.after"),
        *("bind.commit.before", "bind.commit.after", "bind.post.before", "bind.post.after", "bind.confirm.before"),
        *("settle.touch.before", "settle.committed"),
    }
)
_PARTS = 3

_hook: list[Hook] = []


async def fault(name: str) -> None:
    """Let an installed hook act at this point; raises whatever the hook raises."""
    if _hook:
        await _hook[-1](name)


def install(hook: Hook) -> Callable[[], None]:
    """Install a hook and return the call that takes it away again."""
    _hook.append(hook)
    return lambda: _hook.remove(hook)


def deadly(written: str) -> Hook:
    """Return the hook that ends this process by SIGKILL at the given passing of a point.

    Args:
        written: `kill:POINT:N`, N counted from 1.

    Raises:
        ConfigError: it is not written so, or nothing is called POINT.
    """
    parts = written.split(":")
    if len(parts) != _PARTS or parts[0] != "kill" or not parts[2].isdecimal() or int(parts[2]) < 1:
        raise ConfigError(
            f"environment: {VARIABLE} is written kill:POINT:N, N = 1, 2, ..; not {written!r}. Else unset it"
        )
    point, passings = parts[1], int(parts[2])
    if point not in POINTS:
        raise ConfigError(f"environment: {VARIABLE} knows no point {point!r}; there are {', '.join(sorted(POINTS))}")

    async def hook(name: str) -> None:
        nonlocal passings
        passings -= name == point
        if name == point and passings == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook
