"""Identity and chance as values that are passed in, so that a seed fixes a whole run."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import TypeAlias

NewId: TypeAlias = Callable[[], str]


def random_ids() -> str:
    """Return a fresh UUID from the operating system."""
    return str(uuid.uuid4())


def seeded_ids(rng: random.Random) -> NewId:
    """Return a source of UUIDs that repeats itself for the same seed."""

    def next_id() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    return next_id
