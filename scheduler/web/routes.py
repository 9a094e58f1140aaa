"""Every route of Tessera, on one screen. Three listeners: kube-scheduler's, the people's and Prometheus's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from .extender import BODY_MAX, Extender, Reply
from .openapi import READS, described
from .patience import body_of, patience
from .problems import problems, refuse_encodings
from .views import Views

API_BODY_MAX = 256 * 1024


def extender_app(extender: Extender, views: Views) -> web.Application:
    """Serve kube-scheduler; loopback, or behind mutual TLS."""
    app = web.Application(client_max_size=BODY_MAX, middlewares=[patience, problems, refuse_encodings])
    app.router.add_post("/scheduler/filter", _verb(extender.filter))
    app.router.add_post("/scheduler/prioritize", _verb(extender.prioritize))
    app.router.add_post("/scheduler/bind", _verb(extender.bind))
    app.router.add_get("/healthz", views.healthz)
    app.router.add_get("/readyz", views.readyz)
    return app


def api_app(views: Views) -> web.Application:
    """Serve people and their tools; read-only: what `openapi.READS` describes."""
    app = web.Application(client_max_size=API_BODY_MAX, middlewares=[patience, problems, refuse_encodings])
    for path, read in READS.items():
        app.router.add_get(path, partial(read.answer, views))
    app.router.add_get("/api/v1/openapi.json", described)
    app.router.add_get("/healthz", views.healthz)
    app.router.add_get("/readyz", views.readyz)
    return app


def metrics_app(views: Views) -> web.Application:
    """Serve Prometheus, and the kubelet's probes."""
    app = web.Application(client_max_size=API_BODY_MAX, middlewares=[patience, problems, refuse_encodings])
    app.router.add_get("/metrics", views.metrics)
    app.router.add_get("/healthz", views.healthz)
    app.router.add_get("/readyz", views.readyz)
    return app


def _verb(answer: Callable[[bytes], Awaitable[Reply]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(http: web.Request) -> web.Response:
        status, body = await answer(await body_of(http))
        return web.Response(status=status, body=body, content_type="application/json")

    return handler
