"""`tessera why POD`: why it waits and what to do, with an exit status that scripts can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import typer

from scheduler.errors import TesseraError

from .api import Api
from .output import console, reporting, say_json

RUNNING, ERROR = 0, 1
EXIT = {"wait": 2, "change": 3, "admin": 4}
"""Exit status by the class of the first reason; 0 = it runs or ran."""

TEXTS = {"en": "text", "ko": "text_ko"}
"""Language -> key of a reason's sentence in it."""

OVER = frozenset({"RELEASED", "EXPIRED", "CANCELLED", "REJECTED", "FAILED"})
PLACED = frozenset({"BOUND", "RUNNING", "RELEASED"})


class UnknownPodError(TesseraError):
    """Tessera has no Request of this pod."""

    code = "request.not_found"


def why(pod: str, namespace: str, url: str, lang: str, *, as_json: bool) -> None:
    """Explain one pod and exit with what it needs; `lang` is en, ko or empty. Raises typer.Exit, typer.BadParameter."""
    text = TEXTS[language(lang, os.environ)]
    with reporting(as_json=as_json):
        api = Api(url)
        request = find(api, namespace, pod)
        found = api.get(f"/requests/{request['id']}/explanation")
        code = status(found)
        if as_json:
            say_json(found, ok=code == RUNNING)
        else:
            for line in lines(request, found, text):
                console().print(line)
    raise typer.Exit(code)


def find(api: Api, namespace: str, name: str) -> dict[str, Any]:
    """Return the Request of a pod: the living one, else the one that arrived last. Raises UnknownPodError."""
    found = api.items("/requests", namespace=namespace, name=name)
    if not found:
        raise UnknownPodError(
            f"Tessera has no pod {namespace}/{name}; check the namespace (-n) and that its schedulerName is tessera"
        )
    return next((one for one in reversed(found) if one["state"] not in OVER), found[-1])


def status(found: dict[str, Any]) -> int:
    """Return the exit status of an explanation."""
    if found["state"] in PLACED:
        return RUNNING
    return EXIT.get(found["class"] or "", ERROR)


def language(asked: str, environment: Mapping[str, str]) -> str:
    """Return en or ko: what was asked for, else what the locale of messages says. Raises typer.BadParameter."""
    if asked:
        if asked not in TEXTS:
            raise typer.BadParameter(f"--lang {asked}: there are {' and '.join(TEXTS)}")
        return asked
    locale = next((said for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (said := environment.get(name))), "")
    return "ko" if re.match(r"ko(?![a-z])", locale) else "en"


def lines(request: dict[str, Any], found: dict[str, Any], text: str = "text") -> list[str]:
    """Return the explanation as a person reads it; `text` is the key of the sentences."""
    head = [f"{request['namespace']}/{request['name']}", found["state"], f"queue {request['queue']}"]
    if request["node"]:
        head.append(f"node {request['node']}")
    if found["position"]:
        head.append(f"position {found['position']} of {found['waiting']}")
    said = ["  ".join(head)]
    said += [f"  {one[text]}  [{one['code']}: {one['class']}]" for one in found["reasons"]]
    said += [f"  warning: {sentence}" for sentence in found.get("warnings", ())]
    if found["funnel"]:
        said.append("  nodes left: " + " -> ".join(_narrowing(found["funnel"])))
    if found["changes"]:
        ideas = (f"{one['change']} ({one['nodes']} node{'' if one['nodes'] == 1 else 's'})" for one in found["changes"])
        said.append("  would fit now: " + " | ".join(ideas))
    return said


def _narrowing(funnel: list[dict[str, Any]]) -> list[str]:
    """Return the first step of the funnel and those after it that took nodes away."""
    before = [None, *(one["nodes"] for one in funnel)]
    return [
        f"{one['mask']} {one['nodes']}" for one, nodes in zip(funnel, before, strict=False) if one["nodes"] != nodes
    ]
