"""Named points at which a test may make the program fail, stall or die; in production they do nothing.

Invariant: a point's name is a literal `await fault("room.step.before")`, so that a test can collect them all from the
source and demand that each is hit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

Hook: TypeAlias = Callable[[str], Awaitable[None]]

_hook: list[Hook] = []


async def fault(name: str) -> None:
    """Let an installed hook act at this point; raises whatever the hook raises."""
    if _hook:
        await _hook[-1](name)


def install(hook: Hook) -> Callable[[], None]:
    """Install a hook and return the call that takes it away again."""
    _hook.append(hook)
    return lambda: _hook.remove(hook)
