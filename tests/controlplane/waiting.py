"""Waiting for processes that have no fake clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

NEVER = threading.Event()


async def until(done: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Wait for a real process; the API server is asked again after each of its answers."""
    try:
        async with asyncio.timeout(seconds):
            while not await done():
                await asyncio.to_thread(NEVER.wait, 0.05)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")
