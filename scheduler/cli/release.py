"""`tessera release`: let held pods go without Tessera, with nothing but the caller's kubeconfig and an API server.

Invariant: a pod loses the gate `tessera.dev/hold` and nothing else, and only the very pod (uid) that was looked at.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import typer

from scheduler import GATE
from scheduler.errors import TesseraError
from scheduler.kube.api import ApiServer, connect
from scheduler.kube.port import ApiError, Gone, NotFound, Object, UnknownOutcome
from scheduler.kube.wire import path_of

from .output import reporting, say_json

PAGE = 500
_LISTS = 3  # a list may grow too old while we walk it; what was released is not in the next one


class NotHeldError(TesseraError):
    """The pod that was named has no gate of Tessera's."""

    code = "release.not_held"


@dataclass(slots=True)
class Released:
    """What was done: names of pods as `namespace/name`, and for each that kept its gate the reason."""

    released: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def release(
    pod: str | None, namespace: str | None, kubeconfig: Path | None, *, everything: bool, as_json: bool
) -> None:
    """Release one pod, or all of one namespace or of the cluster; exit 0 if none kept its gate. Raises typer.Exit."""
    if everything == (pod is not None):
        raise typer.BadParameter("name one POD, or --all")
    done = Released()
    with reporting(as_json=as_json):
        asyncio.run(_release(done, pod, namespace, kubeconfig))
    if as_json:
        refused = [{"pod": name, "text": text} for name, text in done.refused.items()]
        say_json({"released": done.released, "refused": refused}, ok=not done.refused)
    else:
        sys.stdout.write(f"{len(done.released)} released, {len(done.refused)} refused\n")
    raise typer.Exit(1 if done.refused else 0)


async def _release(done: Released, pod: str | None, namespace: str | None, kubeconfig: Path | None) -> None:
    server = await connect(kubeconfig=str(kubeconfig) if kubeconfig else None, in_cluster=False)
    try:
        if pod is not None:
            found = await server.get("pods", namespace or "default", pod)
            if not _held(found):
                raise NotHeldError(f"pod {_name(found)} has no gate {GATE}; look at it with kubectl describe pod.")
            await _let_go(server, found, done)
        else:
            await _let_all_go(server, namespace or "", done)
    finally:
        await server.close()


async def _let_all_go(server: ApiServer, namespace: str, done: Released) -> None:
    """Walk all pods; a list that grew too old is begun anew."""
    for last in [False] * (_LISTS - 1) + [True]:
        try:
            async for pod in _pods(server, namespace):
                if _held(pod) and _name(pod) not in done.refused:
                    await _let_go(server, pod, done)
        except Gone:
            if last:
                raise
        else:
            return


async def _pods(server: ApiServer, namespace: str) -> AsyncGenerator[Object, None]:
    """Yield pods, page by page."""
    after = ""
    while True:
        query = {"limit": str(PAGE), **({"continue": after} if after else {})}
        page, _ = await server.ask(f"{path_of('pods', namespace)}?{urlencode(query)}")
        for pod in page.get("items") or ():
            yield pod
        after = page.get("metadata", {}).get("continue", "")
        if not after:
            return


async def _let_go(server: ApiServer, pod: Object, done: Released) -> None:
    """Take the gate off this very pod; one that is gone needs nothing."""
    meta = pod["metadata"]
    body: Object = {
        "metadata": {"uid": meta["uid"]},
        "spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]},
    }
    try:
        await server.patch("pods", meta["namespace"], meta["name"], body, patch_type="strategic")
    except NotFound:
        return
    except (ApiError, UnknownOutcome) as error:
        done.refused[_name(pod)] = str(error)
        sys.stderr.write(f"kept     {_name(pod)}: {error}\n")
    else:
        done.released.append(_name(pod))
        sys.stderr.write(f"released {_name(pod)}\n")


def _held(pod: Object) -> bool:
    return any(gate.get("name") == GATE for gate in pod.get("spec", {}).get("schedulingGates") or ())


def _name(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
