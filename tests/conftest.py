"""How hypothesis searches: the same examples every time; `--hypothesis-profile=explore` looks for new ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, derandomize=False, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _logs_of_this_test_alone() -> Iterator[None]:
    """Forget how a command under test has set up its log: its stream is closed by now."""
    yield
    structlog.reset_defaults()
