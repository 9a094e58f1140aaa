"""The reading API, described once: the routes are made from it, and so is the OpenAPI 3.1 document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import orjson
from aiohttp import web

from scheduler.intake.reading import shown
from scheduler.model.subject import Role

from .problems import problem
from .views import PAGE_MAX, SORTS, STATES, Views

Schema: TypeAlias = dict[str, Any]

TEXT, NUMBER, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
TEXT_OR_NULL, NUMBER_OR_NULL = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
TOTAL_AND_FREE: Schema = {
    "type": "object",
    "properties": {"total": NUMBER, "free": NUMBER},
    "required": ["total", "free"],
}
AMOUNTS = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
MICROS = {"type": "integer", "description": "Microseconds since 1970, UTC."}


def thing(**properties: Schema) -> Schema:
    """Return an object that has all of these properties, and may get more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def listed(schema: Schema) -> Schema:
    """Return a list of such things."""
    return {"type": "array", "items": schema}


def named(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


NAMES: Schema = {"type": "array", "items": TEXT}
ROLES = [role.value for role in Role]
PART_OF_MIG = thing(request=TEXT, profile=TEXT, start=COUNT, size=COUNT)
PART_OF_SHARE = thing(request=TEXT, milli=COUNT, mib=COUNT)
LINKS = thing(self=TEXT, explanation=TEXT)
REQUEST: dict[str, Schema] = {
    "id": TEXT,
    "name": TEXT,
    "namespace": TEXT,
    "queue": TEXT,
    "state": {"type": "string", "enum": list(STATES)},
    "reason": {"type": "string", "description": "A word of the vocabulary of reasons; empty = none."},
    "position": {**NUMBER_OR_NULL, "description": "Place in its queue, 1 = next; null for what does not wait."},
    "node": TEXT_OR_NULL,
    "workload": TEXT,
    "links": LINKS,
}
QUEUE: dict[str, Schema] = {
    "name": TEXT,
    "parent": TEXT_OR_NULL,
    "weight": COUNT,
    "nominal": AMOUNTS,
    "borrowLimit": AMOUNTS,
    "lendLimit": AMOUNTS,
    "autoscale": TRUTH,
    "stopped": TRUTH,
    "used": AMOUNTS,
    "borrowed": AMOUNTS,
    "lent": {**AMOUNTS, "description": "Of its own total, what others hold: it cannot take that now."},
    "available": AMOUNTS,
    "potential": AMOUNTS,
    "pending": COUNT,
    "ready": TRUTH,
    "text": TEXT,
    "shown": thing(used=TEXT, borrowed=TEXT),
}
CLASSES = ["wait", "change", "admin"]
REASON: dict[str, Schema] = {"code": TEXT, "class": {"type": "string", "enum": CLASSES}, "text": TEXT, "text_ko": TEXT}
EXPLANATION: dict[str, Schema] = {
    "state": REQUEST["state"],
    "class": {"type": ["string", "null"], "enum": [*CLASSES, None]},
    "reasons": {**listed(named("Reason")), "description": "The one that must go first comes first."},
    "position": REQUEST["position"],
    "waiting": {**COUNT, "description": "How many wait in its queue."},
    "position_overall": {**NUMBER_OR_NULL, "description": "Place over all queues, by priority and age."},
    "waiting_overall": COUNT,
    "warnings": listed(TEXT),
    "funnel": {**listed(thing(mask=TEXT, nodes=COUNT)), "description": "Nodes that are left after each mask."},
    "changes": {
        **listed(thing(change=TEXT, nodes=COUNT)),
        "description": "Single changes that would admit it now, each with the number of nodes.",
    },
}
SCHEMAS: dict[str, Schema] = {
    "Problem": thing(type=TEXT, title=TEXT, status=NUMBER, detail=TEXT, code=TEXT),
    "Node": thing(
        name=TEXT,
        mode={"type": "string", "enum": ["exact", "observed"]},
        product=TEXT,
        gpus=TOTAL_AND_FREE,
        slices={"type": "object", "additionalProperties": TOTAL_AND_FREE},
        cpuMilli=TOTAL_AND_FREE,
        memoryBytes=TOTAL_AND_FREE,
        schedulable=TRUTH,
        ready={**TRUTH, "description": "Its condition Ready is True."},
        wholeGpus={**TRUTH, "description": "nvidia.com/gpu is a whole GPU there."},
        unnamedHolder=TRUTH,
        warnings=listed(TEXT),
        pods=COUNT,
    ),
    "Gpu": thing(
        node=TEXT,
        dev=COUNT,
        uuid=TEXT_OR_NULL,
        model=TEXT,
        product=TEXT,
        memoryMiB=COUNT,
        migMode=TRUTH,
        use={"type": "string", "enum": ["free", "whole", "shared", "mig", "unknown"]},
        memoryMiBFree=NUMBER_OR_NULL,
        milliFree=NUMBER_OR_NULL,
        parts=listed({"anyOf": [PART_OF_MIG, PART_OF_SHARE]}),
        health=TEXT,
        requests=listed(TEXT),
    ),
    "Queue": thing(**QUEUE),
    "QueueAndLine": thing(
        **QUEUE,
        path=listed(TEXT),
        namespaces=listed(TEXT),
        waiting=listed(thing(**REQUEST, priority=NUMBER, arrival=MICROS)),
    ),
    "Request": thing(**REQUEST),
    "RequestInFull": thing(
        **REQUEST,
        text=TEXT,
        allocation={"type": ["object", "null"], "description": "As in the annotation tessera.dev/allocation."},
        created=MICROS,
        updated=MICROS,
        epoch=COUNT,
        asked=thing(gpuMilli=COUNT, cpuMilli=COUNT, memoryMiB=COUNT),
    ),
    "Reason": thing(**REASON),
    "Subject": thing(
        name=TEXT, grants=listed(thing(role={"type": "string", "enum": ROLES}, namespaces=NAMES, queues=NAMES))
    ),
    "Explanation": thing(**EXPLANATION),
}


@dataclass(frozen=True, slots=True)
class Read:
    """One GET.

    Attributes:
        answer: the view.
        schema: name of what it returns.
        paged: it returns pages of such things.
        query: its own query parameters: name -> sentence.
        missing: code of the problem when there is no such thing; empty = it is always there.
    """

    answer: Callable[[Views, web.Request], Awaitable[web.Response]]
    schema: str
    paged: bool = False
    query: tuple[tuple[str, str], ...] = ()
    missing: str = ""

    async def checked(self, views: Views, http: web.Request) -> web.Response:
        """Answer, but not to a parameter that nobody knows: a slip of the pen would find too much."""
        known = [name for name, _ in self.query] + ["limit", "cursor"] * self.paged
        if unknown := sorted(http.query.keys() - known):
            allowed = f"known are {', '.join(known)}" if known else "there are none here"
            return problem(400, "request.malformed", f"there is no parameter {shown(unknown[0])}; {allowed}")
        return await self.answer(views, http)


FILTERED = (
    ("state", f"Comma list of {', '.join(STATES)}."),
    ("queue", "Comma list of names."),
    ("namespace", "Comma list of names."),
    ("name", "Comma list of names."),
    ("sort", f"One of {', '.join(SORTS)}; arrival when absent."),
)
READS: dict[str, Read] = {
    "/api/v1/nodes": Read(Views.nodes, "Node", paged=True),
    "/api/v1/gpus": Read(Views.gpus, "Gpu", paged=True),
    "/api/v1/queues": Read(Views.queues, "Queue", paged=True),
    "/api/v1/queues/{name}": Read(Views.queue, "QueueAndLine", missing="queue.not_found"),
    "/api/v1/me": Read(Views.me, "Subject"),
    "/api/v1/requests": Read(Views.requests, "Request", paged=True, query=FILTERED),
    "/api/v1/requests/{id}": Read(Views.request, "RequestInFull", missing="request.not_found"),
    "/api/v1/requests/{id}/explanation": Read(Views.explanation, "Explanation", missing="request.not_found"),
}


@lru_cache(maxsize=1)
def document() -> Schema:
    """Return the OpenAPI 3.1 document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tessera", "version": "v1", "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": {path: {"get": _operation(path, read)} for path, read in READS.items()},
        "security": [{"bearer": []}],
        "components": {"schemas": SCHEMAS, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, read: Read) -> Schema:
    schema = thing(items=listed(named(read.schema)), next=TEXT_OR_NULL) if read.paged else named(read.schema)
    answers: Schema = {"200": {"description": "Found.", "content": {"application/json": {"schema": schema}}}}
    answers["400"] = _problem("`request.malformed`: a parameter cannot be read, or there is none of this name.")
    answers["401"] = _problem("`access.unauthenticated`: no valid token.")
    answers["403"] = _problem("`access.denied`: no role of whose token it is allows this.")
    answers["429"] = _problem("`rate.limited`: too many calls; see Retry-After.")
    answers["503"] = _problem("`access.unavailable`: whose token it is cannot be found out now; see Retry-After.")
    if read.missing:
        answers["404"] = _problem(f"`{read.missing}`: there is no such thing.")
    return {
        "operationId": read.answer.__name__,
        "summary": (read.answer.__doc__ or "").partition("\n")[0],
        "parameters": _parameters(path, read),
        "responses": answers,
    }


def _parameters(path: str, read: Read) -> list[Schema]:
    found: list[Schema] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": TEXT}
        for part in path.split("/")
        if part.startswith("{")
    ]
    for name, text in read.query:
        found.append({"name": name, "in": "query", "description": text, "schema": TEXT})
    if read.paged:
        limit = {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": 100}
        found.append({"name": "limit", "in": "query", "schema": limit})
        found.append({"name": "cursor", "in": "query", "description": "`next` of the page before.", "schema": TEXT})
    return found


def _problem(text: str) -> Schema:
    return {"description": text, "content": {"application/problem+json": {"schema": named("Problem")}}}


async def described(_: web.Request) -> web.Response:
    """Answer with the document."""
    return web.Response(body=orjson.dumps(document()), content_type="application/json")
