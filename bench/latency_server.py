"""The two servers of `bench latency`, each a process of its own: Tessera's handlers, and a canned answer.

`python -m bench.latency_server tessera --nodes N --seed S` fills a desk and serves the product's own extender
application on the product's own runner; `canned` reads each body unparsed and answers bytes of a given length on a
plain one. Both run on aiohttp and uvloop and print one JSON line when ready. A second listener, never timed, sets K or
lengths, lets pods come and go as the watch does, and tells CPU and RSS.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from pathlib import Path

import numpy as np
import orjson
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler

from bench.latency_world import ask, world
from scheduler import geometry
from scheduler.clock import RealClock
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.intake.extender import BindArgs
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.metrics import Metrics
from scheduler.web.extender import BODY_MAX, Extender
from scheduler.web.http1 import ListenerRunner
from scheduler.web.routes import extender_routes
from scheduler.web.views import Views

LEARNED = 500  # requests that came before, so that every score has something to look at


def filled(nodes: int, seed: int) -> Desk:
    """Return a desk with the bench's cluster in it: running pods booked, requests of the same kinds learned."""
    desk = Desk(RealClock(), Policies())
    products = dict(geometry.products())
    for raw, pods, _ in world(nodes, seed):
        node = read_node(raw, products)
        assert node is not None
        desk.registry.put_node(node)
        for pod in pods:
            desk.registry.put_pod(read_pod(pod))
    rng = np.random.default_rng([seed, nodes, 2])
    for number in range(LEARNED):
        desk.arrivals.learn(read_pod(orjson.loads(ask(rng, number).pod)).request, desk.clock.wall_us())
    desk.registry.snapshot()
    return desk


def tessera(desk: Desk) -> tuple[web.BaseRunner, web.Application]:
    """Return the product's extender port over a desk, and the control beside it."""
    metrics = Metrics(desk.clock, "bench")

    async def no_bind(_: BindArgs) -> str:
        return "this bench binds nothing"

    async def control(http: web.Request) -> web.Response:
        asked = orjson.loads(await http.read())
        desk.count = asked.get("count", desk.count)
        for pod in asked.get("come", ()):
            desk.registry.put_pod(read_pod(pod))
        for uid in asked.get("go", ()):
            desk.drop_intent(uid)
            desk.registry.remove_pod(uid)
        return _measured()

    extender = Extender(desk, desk.clock, metrics, str, no_bind)
    return ListenerRunner(extender_routes(extender, Views(desk, metrics, str)), BODY_MAX), _control(control)


def canned() -> tuple[web.BaseRunner, web.Application]:
    """Return a server of aiohttp that answers bytes of the lengths last asked for, and the control that sets them."""
    answers = {"filter": b"{}", "prioritize": b"[]"}

    async def answer(http: web.Request) -> web.Response:
        await http.read()
        return web.Response(body=answers[http.match_info["verb"]], content_type="application/json")

    async def control(http: web.Request) -> web.Response:
        for verb, length in orjson.loads(await http.read()).get("lengths", {}).items():
            answers[verb] = b" " * length
        return _measured()

    app = web.Application(client_max_size=BODY_MAX)
    app.router.add_post("/scheduler/{verb}", answer)
    return web.AppRunner(app, access_log=None), _control(control)


def _control(handler: Handler) -> web.Application:
    app = web.Application(client_max_size=BODY_MAX)
    app.router.add_post("/control", handler)
    return app


def _measured() -> web.Response:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return web.json_response({"cpu_s": time.process_time(), "rss_mib": rss_mib})


async def serve(timed: web.BaseRunner, control: web.BaseRunner) -> None:
    """Listen, say where, and stay."""
    ports = []
    for runner in (timed, control):
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
    gc.collect()
    gc.freeze()
    print(json.dumps({"port": ports[0], "control": ports[1]}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve what the command line names until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tessera", "canned"))
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    timed, control = tessera(filled(chosen.nodes, chosen.seed)) if chosen.what == "tessera" else canned()
    uvloop.run(serve(timed, web.AppRunner(control, access_log=None)))


if __name__ == "__main__":
    main()
