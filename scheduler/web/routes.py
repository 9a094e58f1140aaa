"""Every route of Tessera, on one screen. Three listeners: kube-scheduler's, the people's and Prometheus's."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from .access import Access, seal
from .extender import Extender
from .http1 import Route
from .openapi import READS, described
from .patience import patience
from .problems import problems, refuse_encodings
from .views import Views

API_BODY_MAX = 256 * 1024


def extender_routes(extender: Extender, views: Views) -> dict[str, Route]:
    """Serve kube-scheduler; loopback, or behind mutual TLS. Its calls are too many for a framework: see `http1`."""
    return {
        "/scheduler/filter": Route("POST", extender.filtered, after=extender.settle),
        "/scheduler/prioritize": Route("POST", extender.prioritized),
        "/scheduler/bind": Route("POST", extender.bind),
        "/healthz": Route("GET", views.live, "text/plain; charset=utf-8"),
        "/readyz": Route("GET", views.ready, "text/plain; charset=utf-8"),
    }


def api_app(views: Views, access: Access) -> web.Application:
    """Serve people and their tools; read-only: what `openapi.READS` describes. Raises ConfigError without a rule."""
    inner = [patience, problems, refuse_encodings, access.door()]
    app = web.Application(client_max_size=API_BODY_MAX, middlewares=inner)
    for path, read in READS.items():
        app.router.add_get(path, partial(read.checked, views))
    app.router.add_get("/api/v1/openapi.json", described)
    app.router.add_get("/healthz", views.healthz)
    app.router.add_get("/readyz", views.readyz)
    return seal(app)


def metrics_app(views: Views) -> web.Application:
    """Serve Prometheus, and the kubelet's probes."""
    app = web.Application(client_max_size=API_BODY_MAX, middlewares=[patience, problems, refuse_encodings])
    app.router.add_get("/metrics", views.metrics)
    app.router.add_get("/healthz", views.healthz)
    app.router.add_get("/readyz", views.readyz)
    return app
