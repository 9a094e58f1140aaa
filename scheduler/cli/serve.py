"""`tessera serve`: the product as a process. Open what it needs, start, say so, and stop when told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import ssl
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import orjson
import structlog
import typer
from aiohttp import web

from scheduler import config as configuration
from scheduler import faults, logs
from scheduler.app import App
from scheduler.clock import Clock, RealClock
from scheduler.embedded.world import World
from scheduler.errors import ConfigError
from scheduler.ids import random_ids
from scheduler.intake.queue import read_documents
from scheduler.kube.lease import Occupancy
from scheduler.kube.port import Cluster
from scheduler.loops import forever
from scheduler.model.queue import Queue
from scheduler.model.subject import Grant, Role
from scheduler.store.store import Store
from scheduler.store.writer import ThreadedWriter
from scheduler.web.access import Access
from scheduler.web.bearer import Review
from scheduler.web.doors import door_of
from scheduler.web.extender import BODY_MAX
from scheduler.web.http1 import ListenerRunner
from scheduler.web.patience import GuardedRunner
from scheduler.web.routes import api_app, extender_routes, metrics_app
from scheduler.web.tls import Files, MutualTlsSite, RotatingContext, TlsSite
from scheduler.web.tokens import ApiToken, new_token, write_secret
from scheduler.web.webhook import Webhook, webhook_app

from .places import default_url, make_state_folder

if TYPE_CHECKING:
    from scheduler.certificates import SharedCertificate
    from scheduler.web.agents import Agents

log = structlog.get_logger(__name__)

STOP_S = 6.0
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
AGENTS = "tessera-agents"  # the Service in front of the port for agents
EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104 - addresses that no certificate names
CERTIFICATE_S = 60.0  # how often the shared certificate is looked at
HANG_UP_S = 0.5  # twice this for each listener, for clients that never finish what they began


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `serve`."""

    kubeconfig: Path | None
    in_cluster: bool
    embedded: Path | None
    config: Path | None
    db: str
    extender: str
    api: str
    metrics: str
    extender_tls_cert: Path | None = None
    extender_tls_key: Path | None = None
    extender_client_ca: Path | None = None
    queues: Path | None = None
    webhook: str = ""
    agents: str = ""
    agents_token: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    dev_token: Path | None = None

    def tls(self) -> Files | None:
        """Return the extender's TLS files, None when it speaks plain HTTP. Raises typer.BadParameter."""
        cert, key, client_ca = self.extender_tls_cert, self.extender_tls_key, self.extender_client_ca
        if cert is not None and key is not None and client_ca is not None:
            return Files(cert, key, client_ca)
        if cert is None and key is None and client_ca is None:
            return None
        raise typer.BadParameter("--extender-tls-cert, --extender-tls-key and --extender-client-ca belong together")

    def shown_tls(self) -> Files | None:
        """Return the TLS files of webhook and agents, None when there are none. Raises typer.BadParameter."""
        if self.tls_cert is not None and self.tls_key is not None and (self.webhook or self.agents):
            return Files(self.tls_cert, self.tls_key)
        if self.tls_cert is None and self.tls_key is None:
            return None
        raise typer.BadParameter("--tls-cert and --tls-key belong together, and to --webhook or --agents")

    def check_agents(self) -> None:
        """Refuse a port for agents that nobody could use, or everybody. Raises typer.BadParameter."""
        if self.agents_token is not None and (self.embedded is None or not self.agents):
            raise typer.BadParameter("--agents-token belongs to --agents and --embedded; a cluster knows its agents")
        if self.agents and self.embedded is not None and self.agents_token is None:
            raise typer.BadParameter("--agents with --embedded needs --agents-token FILE, which is written")
        if self.agents and (self.agents_token is not None or (self.shown_tls() is None and not self.webhook)):
            loopback(self.agents, "--agents", "or name --tls-cert and --tls-key, which let it listen anywhere")


def run(options: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raises typer.Exit or TesseraError."""
    if sum((options.kubeconfig is not None, options.in_cluster, options.embedded is not None)) != 1:
        raise typer.BadParameter("name exactly one of --kubeconfig FILE, --in-cluster and --embedded DIR")
    if options.tls() is None:
        loopback(options.extender, "--extender", "or name the three TLS files, which let it listen anywhere")
    options.shown_tls()
    options.check_agents()
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - optional, extra [fast]

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve(options))


async def _serve(options: Options) -> None:
    settings = configuration.load(options.config, os.environ)
    logs.configure(settings.log.level, settings.log.format)
    if not settings.access.configured:
        loopback(options.api, "--api", "or say in the configuration under `access` who may use it")
    for name in settings.without_effect():
        log.warning("config.no_effect_yet", key=name)
    if written := os.environ.get(faults.VARIABLE):
        faults.install(faults.deadly(written))
        log.warning("fault.armed", dies=written)
    given = queues_of(options.queues)
    tls = RotatingContext.of(files) if (files := options.tls()) else None
    clock = RealClock()
    if not options.db:
        make_state_folder()
    store = Store.open(options.db or default_url())
    try:
        async with _cluster(options, clock) as (cluster, world):
            who = {"namespace": settings.namespace, "database": store.identity, "nonce": random_ids()}
            occupancy = Occupancy(cluster, clock, **who)
            app = App(settings, clock, cluster, store, ThreadedWriter(store), Random(os.getpid()))  # noqa: S311 - jitter
            app.missing = occupancy.missing
            if world is not None:
                world.extender = app.extender
            app.queues.given = given
            door = _door(options, app, cluster if world is None else None)
            agents = _agents(options, app, cluster) if options.agents else None
            await _live(app, options, occupancy, tls, door, agents=agents)
    finally:
        store.close()


def queues_of(path: Path | None) -> list[Queue] | None:
    """Return the queues of a file, None where no file was named. Raises ConfigError."""
    if path is None:
        return None
    try:
        return read_documents(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


@asynccontextmanager
async def _cluster(options: Options, clock: Clock) -> AsyncGenerator[tuple[Cluster, World | None], None]:
    """Connect to the API server, or make the embedded cluster."""
    if options.embedded is not None:
        world = World(clock, random_ids, Random())  # noqa: S311 - the embedded kube-scheduler's ties
        world.load(options.embedded)
        async with world.running():
            yield world.cluster, world
        return
    from scheduler.kube.api import connect  # noqa: PLC0415 - half a second of import the embedded mode can do without

    server = await connect(
        kubeconfig=str(options.kubeconfig) if options.kubeconfig else None, in_cluster=options.in_cluster
    )
    try:
        yield server, None
    finally:
        await server.close()


def _door(options: Options, app: App, server: Cluster | None) -> Access:
    """Return who is let in; a developer's token is made anew at every start. Raises ConfigError."""
    own: ApiToken | None = None
    if options.dev_token is not None:
        text, own = new_token("dev", Grant(Role.ADMIN))
        write_secret(options.dev_token, text + "\n")
    review: Review | None = None
    if server is not None and app.settings.access.kubernetes is not None:
        from scheduler.kube.reviewing import reviewer  # noqa: PLC0415 - only where people are known by Kubernetes

        review = reviewer(server)
    return door_of(app.settings.access, app.clock, review, own)


def _agents(options: Options, app: App, server: Cluster) -> Agents:
    """Return what talks to node agents; a token of our own is made anew at every start. Raises ConfigError."""
    from scheduler.web.agents import Agents  # noqa: PLC0415 - the reader of reports, only where it is used
    from scheduler.web.vouching import by_kubernetes, by_token  # noqa: PLC0415 - as above

    if options.agents_token is not None:
        text = secrets.token_urlsafe(32)
        write_secret(options.agents_token, text + "\n")
        return Agents(app.desk, by_token(text), app.metrics.registry)
    from scheduler.kube.reviewing import extra_reviewer  # noqa: PLC0415 - only where there is an API server

    vouch = by_kubernetes(extra_reviewer(server), app.settings.agentNamespace)
    return Agents(app.desk, vouch, app.metrics.registry)


async def _live(
    app: App,
    options: Options,
    occupancy: Occupancy,
    tls: RotatingContext | None,
    door: Access,
    *,
    agents: Agents | None = None,
) -> None:
    """Start listening, recover as soon as the API server can be reached, say ready, and wait for the end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runners: list[web.BaseRunner] = []
    try:
        names = app.settings.extender.clientNames
        site = partial(MutualTlsSite, context=tls, allowed=names) if tls else web.TCPSite
        kube_scheduler = ListenerRunner(extender_routes(app.extender, app.views), BODY_MAX, shutdown_timeout=HANG_UP_S)
        urls = [
            await _listen(runners, kube_scheduler, options.extender, site),
            await _listen(runners, _guarded(api_app(app.views, door)), options.api),
            await _listen(runners, _guarded(metrics_app(app.views)), options.metrics),
        ]
        hook, certificate = await _listen_webhook(runners, app, options) if options.webhook else (None, None)
        stream = await _listen_agents(runners, app, options, agents, certificate) if agents is not None else None
        ends = [loop.create_task(work) for work in (app.crew.failed(), stop.wait())]
        starting = loop.create_task(_begin(app, occupancy, certificate))
        try:
            await asyncio.wait({*ends, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                gc.freeze()  # with what little garbage there is: to look for it takes a third of a second
                gc.enable()
                _say_ready(urls, hook, stream)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over = [task for task in ends if task.done()]
            for task in (starting, *ends):
                task.cancel()
            await _stop(app, occupancy)
        for task in over:
            task.result()  # raises, unless we were told to stop
    finally:
        for runner in runners:
            await runner.cleanup()


async def _begin(app: App, occupancy: Occupancy, certificate: SharedCertificate | None) -> None:
    """Take the cluster, keep it, and start; returns when ready."""
    await occupancy.acquire(fence=app.store.fence)
    app.crew.spawn(occupancy.run())
    await app.start()
    if certificate is not None:
        await certificate.step()
        app.crew.spawn(forever("certificate", certificate.step, app.clock, CERTIFICATE_S))


async def _stop(app: App, occupancy: Occupancy) -> None:
    """End in good order, but not later than we were told to."""
    try:
        async with asyncio.timeout(STOP_S):
            await app.stop()
            await occupancy.release()
    except TimeoutError:
        log.warning("stop.cut_short", seconds=STOP_S)


def _say_ready(urls: list[str], webhook: str | None, agents: str | None) -> None:
    extender, api, metrics = urls
    line = {
        "ready": True,
        "pid": os.getpid(),
        "extender": f"{extender}/scheduler",
        "api": api,
        "webhook": webhook,
        "agents": agents,
        "metrics": f"{metrics}/metrics",
    }
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


async def _listen_webhook(
    runners: list[web.BaseRunner], app: App, options: Options
) -> tuple[str, SharedCertificate | None]:
    """Listen for kube-apiserver; return the URL to call, and the certificate where Tessera makes its own."""
    listener = webhook_app(Webhook(app.metrics.registry))
    own: SharedCertificate | None = None
    if files := options.shown_tls():
        context: ssl.SSLContext = RotatingContext.of(files)
    else:
        from scheduler.certificates import SharedCertificate, service_names  # noqa: PLC0415 - dear, and only for this

        host, namespace = split(options.webhook)[0], app.settings.namespace
        names = [*service_names(namespace), *([] if host in EVERYWHERE else [host])]
        names += [f"{AGENTS}.{namespace}.svc", f"{AGENTS}.{namespace}.svc.cluster.local"] if options.agents else []
        own = SharedCertificate(None if options.embedded else app.cluster, app.clock, namespace, names)
        context = own.context
    url = await _listen(runners, _guarded(listener), options.webhook, partial(TlsSite, context=context))
    return f"{url}/mutate", own


async def _listen_agents(
    runners: list[web.BaseRunner], app: App, options: Options, agents: Agents, own: SharedCertificate | None
) -> str:
    """Listen for node agents, and for their silence; return the URL to connect to.

    Without TLS files the webhook's own certificate serves here too, except on loopback.
    """
    from scheduler.web.agents import agents_app  # noqa: PLC0415 - only where it is used

    app.crew.spawn(forever("agents", agents.step, app.clock, 1.0))
    context: ssl.SSLContext | None = RotatingContext.of(files) if (files := options.shown_tls()) else None
    if own is not None and split(options.agents)[0] not in LOOPBACK:
        context = own.context
    site = partial(TlsSite, context=context) if context is not None else web.TCPSite
    url = await _listen(runners, _guarded(agents_app(agents)), options.agents, site)
    return url.replace("http", "ws", 1)


def _guarded(app: web.Application) -> web.BaseRunner:
    return GuardedRunner(app, access_log=None, handle_signals=False, shutdown_timeout=HANG_UP_S)


async def _listen(
    runners: list[web.BaseRunner],
    runner: web.BaseRunner,
    address: str,
    make: Callable[[web.BaseRunner, str, int], web.BaseSite] = web.TCPSite,
) -> str:
    host, port = split(address)
    await runner.setup()
    runners.append(runner)
    try:
        site = make(runner, host, port)
        await site.start()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)  # without asyncio's preamble
        raise ConfigError(f"cannot listen on {address}: {why}; choose another port") from error
    bound = runner.addresses[0]
    shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    return f"{'https' if isinstance(site, TlsSite) else 'http'}://{shown}:{bound[1]}"


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raises typer.BadParameter."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - the largest port
        raise typer.BadParameter(f"{address!r} is not HOST:PORT, such as 127.0.0.1:8888")
    return host.strip("[]"), int(port)


def loopback(address: str, option: str, otherwise: str = "") -> None:
    """Refuse to listen where strangers can reach an unauthenticated port. Raises typer.BadParameter."""
    if split(address)[0] not in LOOPBACK:
        advice = ", ".join(part for part in ("use 127.0.0.1", otherwise) if part)
        raise typer.BadParameter(f"{option} {address}: there is no access control on this port; {advice}")
