"""The paper kubelets of a bench run: what is bound runs, and what is due ends, by status patches and deletions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from bench.apiclient import ApiClient, Json
from bench.kube_objects import delete_pod, set_phase
from bench.oracle import bound_to, ours
from bench.workload import Ending

PODS = "/api/v1/pods"


class Life:
    """Follows the pods of ours and plays their life, one write at a time, in the order in which it fell due.

    Attributes:
        bound: pods that were ever seen bound, by name.
        last_bound_s: when the last one was seen, on the monotonic clock.
    """

    def __init__(self, api: ApiClient, endings: Mapping[str, Ending]) -> None:
        """Note whose life ends when; nothing is followed yet."""
        self._api = api
        self._endings = dict(endings)
        self._due: asyncio.Queue[tuple[str, Json]] = asyncio.Queue()
        self.bound: dict[str, Json] = {}
        self.last_bound_s = time.monotonic()

    async def follow(self) -> None:
        """Watch pods until cancelled."""
        version = str((await self._api.get(f"{PODS}?limit=1"))["metadata"]["resourceVersion"])
        while True:
            async for event in self._api.watch(PODS, version):
                pod = event["object"]
                version = pod["metadata"]["resourceVersion"]
                if ours(pod) and bound_to(pod) and pod["metadata"]["name"] not in self.bound:
                    self._see_bound(pod)

    def _see_bound(self, pod: Json) -> None:
        self.bound[pod["metadata"]["name"]] = pod
        self.last_bound_s = time.monotonic()
        self._due.put_nowait(("Running", pod))

    def advance(self, tick: int) -> None:
        """End what is bound and due at this tick."""
        over = [name for name, ending in self._endings.items() if ending.tick <= tick and name in self.bound]
        for name in over:
            self._due.put_nowait((self._endings.pop(name).phase, self.bound[name]))

    async def play(self) -> None:
        """Write what falls due until cancelled."""
        while True:
            phase, pod = await self._due.get()
            await (delete_pod(self._api, pod) if phase == "deleted" else set_phase(self._api, pod, phase))
            self._due.task_done()

    async def written(self) -> None:
        """Wait until all that fell due so far is written."""
        await self._due.join()
