from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import pytest

from scheduler.clock import VirtualLoop

Loops = Mapping[str, Callable[[], AbstractEventLoop]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    """The whole program runs in virtual time."""
    return {"virtual": VirtualLoop}
