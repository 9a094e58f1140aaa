"""The OpenAPI document is valid, names every route, and describes what the routes really answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from aiohttp import web
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from scheduler.web.openapi import document
from scheduler.web.routes import api_app
from tests.cli.stage import Stage
from tests.objects import raw_node
from tests.web.test_faces import OPEN, Faces, serving

PATHS = [
    "/api/v1/nodes",
    "/api/v1/gpus",
    "/api/v1/queues",
    "/api/v1/queues/default",
    "/api/v1/requests",
    "/api/v1/requests/uid-runs",
    "/api/v1/requests/uid-waits",
    "/api/v1/requests/uid-runs/explanation",
    "/api/v1/requests/uid-waits/explanation",
    "/api/v1/requests/uid-bad/explanation",
]


def strict(schema: Any) -> Any:
    """Return the schema with nothing allowed beyond what it describes."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    whole = set(found.get("properties", ())) == set(found.get("required", ()))
    if found.get("type") == "object" and "additionalProperties" not in found and whole and "required" in found:
        found["additionalProperties"] = False
    return found


def schema_of(path: str, status: str) -> dict[str, Any]:
    """Return what the document says of an answer."""
    here = next(one for one in document()["paths"] if fits(one, path))
    (content,) = document()["paths"][here]["get"]["responses"][status]["content"].values()
    found: dict[str, Any] = strict({**content["schema"], "components": document()["components"]})
    return found


def fits(template: str, path: str) -> bool:
    parts, given = template.split("/"), path.split("/")
    return len(parts) == len(given) and all(a == b or a.startswith("{") for a, b in zip(parts, given, strict=True))


def test_it_is_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(orjson.loads(orjson.dumps(document()))).validate()
    assert document()["openapi"].startswith("3.1")
    operations = [one["get"]["operationId"] for one in document()["paths"].values()]
    assert len(set(operations)) == len(operations)
    assert all(one["get"]["summary"].endswith(".") for one in document()["paths"].values())


def test_every_route_of_the_api_is_in_it() -> None:
    routes = {route.resource.canonical for route in api_app(Faces().views, OPEN).router.routes() if route.resource}
    apart = {"/healthz", "/readyz", "/api/v1/openapi.json"}
    assert routes - apart == document()["paths"].keys()


async def test_it_is_served() -> None:
    async with serving(api_app(Faces().views, OPEN)) as client:
        answer = await client.get("/api/v1/openapi.json")
        assert (answer.status, await answer.json()) == (200, document())


@pytest.mark.parametrize("path", PATHS)
async def test_answers_are_as_described(path: str) -> None:
    stage = Stage()
    size = {"tessera.dev/gpu-memory": "10Gi"}
    stage.node(raw_node("mig-1", **{"tessera.dev/mig-devices": "0"}), {"nvidia.com/mig-3g.40gb": "2"})
    stage.bound("slice", "mig-1", ask={"nvidia.com/mig-3g.40gb": "1"})
    stage.bound("share", "mig-1", ask={"tessera.dev/share": "1"}, annotations=size)
    stage.bound("runs", "exact-1", 2)
    stage.pod("waits", 8, annotations={"tessera.dev/gpu-model": "A100"})
    stage.pod("bad", 1, annotations={"tessera.dev/gpu-milli": "100"})
    async with stage.serving(), serving(web.Application()) as client:
        answer = await client.get(stage.url + path)
        assert answer.status == 200
        Draft202012Validator(schema_of(path, "200")).validate(await answer.json())


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [("/api/v1/requests", "?sort=x", 400), ("/api/v1/gpus", "?limit=0", 400), ("/api/v1/requests/x", "", 404)],
)
async def test_problems_are_as_described(path: str, query: str, status: int) -> None:
    async with serving(api_app(Faces().views, OPEN)) as client:
        answer = await client.get(path + query)
        assert answer.status == status
        Draft202012Validator(schema_of(path, str(status))).validate(await answer.json(content_type=None))
