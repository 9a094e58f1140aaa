"""A process that writes to a ledger until it is killed, and tells what was acknowledged: one JSON line each."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from itertools import count

from scheduler.errors import OccupiedError
from scheduler.model.reservation import State
from scheduler.store.store import Store
from scheduler.store.writer import ThreadedWriter
from tests.ledger.lives import history

CLIENTS = 8


async def write(url: str, prefix: str, out: int) -> None:
    """Let eight clients each reserve, bind and post one Request after the other, for ever; tell it on a descriptor."""
    store = Store.open(url)
    writer = ThreadedWriter(store)
    numbers = count()

    async def client() -> None:
        while True:
            name = f"{prefix}-{next(numbers)}"
            for change in history(State.BOUND, name, fence=store.fence):
                await writer.commit((change,))
                os.write(out, f"{json.dumps([name, change.after.state.value])}\n".encode())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


if __name__ == "__main__":
    try:
        asyncio.run(write(sys.argv[1], "main", sys.stdout.fileno()))
    except OccupiedError as error:
        sys.exit(str(error))
