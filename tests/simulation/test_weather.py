"""Every tenth call to the API server goes wrong; in the end every pod that fits is bound and every record agrees."""

from __future__ import annotations

from random import Random

import pytest

from scheduler.embedded.injected import Rates
from tests.simulation.town import town

BAD = {
    "bind": Rates(conflict=0.025, throttled=0.025, failed=0.025, lost_reply=0.025),
    "patch": Rates(conflict=0.025, throttled=0.025, failed=0.025, lost_reply=0.025),
    "get": Rates(throttled=0.05, failed=0.05),
    "list": Rates(gone=0.05, failed=0.05),
    "watch": Rates(gone=0.05, failed=0.05),
}


@pytest.mark.parametrize("seed", range(6))
async def test_bad_weather(seed: int) -> None:
    rng = Random(seed)
    async with town("a", "b", "c", seed=seed) as place:
        weather = place.world.cluster.faults
        weather.rates.update(BAD)
        weather.watch_delay_s, weather.watch_end = 0.2, 0.02
        names: list[str] = []
        for number in range(60):
            names.append(f"pod-{number}")
            weather.calm()
            await place.pod(names[-1], gpus=rng.choice((0, 1, 1, 2, 4, 8)))
            if number > 8:
                await place.delete(names.pop(rng.randrange(len(names))))
            weather.rates.update(BAD)
            weather.watch_delay_s, weather.watch_end = 0.2, 0.02
            await place.wait(rng.uniform(0.2, 4.0))
            if number % 25 == 24:
                place.kill()
                await place.wait(rng.uniform(0.0, 5.0))
                await place.start()
        weather.calm()
        await place.wait(400)
        waiting = [pod["metadata"]["name"] for pod in place.witness.waiting()]
        fits = [
            uid
            for uid in place.tessera.turner.waiting
            if place.tessera.desk.order.words.get(uid) != "WaitingBehindPriority"
            and place.tessera.desk.fits(place.tessera.desk.registry.pods[uid]).passes.any()
        ]
        assert fits == [], waiting
        assert len(place.bound()) + len(waiting) == len(names)
        await place.check()
