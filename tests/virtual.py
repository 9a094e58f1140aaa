"""Tests in virtual time, each in a place of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from scheduler.clock import VirtualLoop

_Place = TypeVar("_Place")


def virtual(
    place: Callable[[], AbstractAsyncContextManager[_Place]],
) -> Callable[[Callable[[_Place], Awaitable[None]]], Callable[[], None]]:
    """Return a decorator that runs a test on a loop whose time jumps, with what `place` yields."""

    def decorate(test: Callable[[_Place], Awaitable[None]]) -> Callable[[], None]:
        async def inside() -> None:
            async with place() as here:
                await test(here)

        def outside() -> None:
            loop = VirtualLoop()
            try:
                loop.run_until_complete(inside())
            finally:
                loop.close()

        outside.__name__ = getattr(test, "__name__", "")
        return outside

    return decorate
