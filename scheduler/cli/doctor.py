"""`tessera doctor`: is everything around Tessera as it needs it? One line for each question, and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import typer
from rich.text import Text

from scheduler.certificates import CONFIGURATION
from scheduler.clock import RealClock
from scheduler.kube.api import ApiServer, connect
from scheduler.kube.lease import NAME as LEASE
from scheduler.kube.port import ApiError, Kind, NotFound, Object

from . import checks
from .api import Api, UnreachableError
from .checks import Check, unread
from .output import console, reporting, say_json
from .rights import RIGHTS, Right
from .scheduler_config import check_configuration

_Answer = TypeVar("_Answer")
FORBIDDEN = (401, 403)
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
CONFIG_MAP, CONFIG_KEY = "kube-scheduler", "config.yaml"
ADMISSION_KINDS = (
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
    "mutatingwebhookconfigurations",
)
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_AUTHORIZATION = "/apis/authorization.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `doctor`."""

    kubeconfig: Path | None
    in_cluster: bool
    api: str
    namespace: str
    kube_scheduler_config: Path | None


def doctor(options: Options, *, as_json: bool) -> None:
    """Check, print, and exit 0 unless something failed. Raises typer.Exit."""
    with reporting(as_json=as_json):
        found = asyncio.run(_examine(options))
    ok = not any(one.status == "fail" for one in found)
    if as_json:
        say_json({"checks": [asdict(one) for one in found]}, ok=ok)
    else:
        _print(found)
    raise typer.Exit(0 if ok else 1)


def _print(found: Sequence[Check]) -> None:
    width = max(len(one.check) for one in found)
    for one in found:
        said = Text.assemble((f"{one.status:<5}", COLOURS[one.status]), f"{one.check:<{width}}  {one.text}")
        console().print(said)
        if one.do:
            console().print(Text(f"{'':{width + 7}}-> {one.do}"))


async def _examine(options: Options) -> list[Check]:
    path = str(options.kubeconfig) if options.kubeconfig else None
    server = await connect(kubeconfig=path, in_cluster=options.in_cluster)
    try:
        found = await _cluster(server, options)
    finally:
        await server.close()
    return [*found, _api(options.api)]


async def _cluster(server: ApiServer, options: Options) -> list[Check]:
    time, namespace = RealClock(), options.namespace
    before_us = time.wall_us()
    try:
        version, date = await server.ask("/version")
    except ApiError as error:
        return [Check("API server", "fail", str(error), "check the kubeconfig, the network and the API server")]
    clock = checks.clock(date, before_us / 1_000_000, time.wall_us() / 1_000_000)
    nodes, pods = await asyncio.gather(_all(server, "nodes"), _all(server, "pods"))
    found = [checks.api_version(version), clock, *await _rights(server, namespace)]
    if pods is None:
        found.append(unread("kube-scheduler version", "pods may not be listed"))
    else:
        found.append(checks.kube_scheduler_version(version, pods, namespace))
    found += await _configuration(server, options)
    if nodes is None:
        found.append(unread("GPU nodes", "nodes may not be listed"))
    else:
        found += checks.nodes(nodes, pods or [])
    return [*found, *await _admission(server), await _lease(server, namespace, time.wall_us())]


async def _all(server: ApiServer, kind: Kind) -> list[Object] | None:
    """Return all objects of a kind, None where they may not be read."""
    found: list[Object] = []
    after = ""
    while True:
        page = await _allowed(server.list(kind, after=after))
        if page is None:
            return None
        found += page.items
        after = page.next
        if not after:
            return found


async def _allowed(asked: Awaitable[_Answer]) -> _Answer | None:
    """Return an answer, None where it may not be read; other refusals are errors."""
    try:
        return await asked
    except ApiError as error:
        if error.status in FORBIDDEN:
            return None
        raise


async def _rights(server: ApiServer, namespace: str) -> list[Check]:
    """Judge the rights of whose kubeconfig this is, and of Tessera's account where others may be asked about."""
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    asked = await _allowed(server.ask("/apis/authentication.k8s.io/v1/selfsubjectreviews", review))
    me = asked[0]["status"]["userInfo"].get("username", "") if asked else ""
    account = f"system:serviceaccount:{namespace}:tessera"
    found: list[Check] = []
    for check, who in (("rights", ""), ("rights of Tessera", account)):
        if who == me:
            continue
        answers = await asyncio.gather(*(_may(server, right, namespace, who) for right in RIGHTS))
        known = [(right, bool(may)) for right, may in zip(RIGHTS, answers, strict=True) if may is not None]
        if len(known) == len(RIGHTS):
            found.append(checks.rights(check, who or me or "this kubeconfig", known))
        else:
            found.append(unread(check, "access reviews are not allowed"))
    return found


async def _may(server: ApiServer, right: Right, namespace: str, who: str) -> bool | None:
    """Ask whether somebody (empty = we) has a right; None where this may not be asked."""
    kind = "SubjectAccessReview" if who else "SelfSubjectAccessReview"
    spec: Object = {"resourceAttributes": right.attributes(namespace)}
    if who:
        spec["user"] = who
        spec["groups"] = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    review: Object = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
    asked = await _allowed(server.ask(f"{_AUTHORIZATION}/{kind.lower()}s", review))
    return bool(asked[0]["status"].get("allowed")) if asked else None


async def _configuration(server: ApiServer, options: Options) -> list[Check]:
    title = "kube-scheduler configuration"
    if (path := options.kube_scheduler_config) is not None:
        try:
            text = await asyncio.to_thread(path.read_text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return [Check(title, "fail", f"{path} cannot be read: {error}", "name a readable file")]
        return check_configuration(text, str(path))
    where = f"ConfigMap {options.namespace}/{CONFIG_MAP}"
    try:
        asked = await _allowed(server.ask(f"/api/v1/namespaces/{options.namespace}/configmaps/{CONFIG_MAP}"))
    except NotFound:
        do = "name kube-scheduler's file with --kube-scheduler-config"
        return [Check(title, "warn", f"there is no {where}", do)]
    if asked is None:
        return [unread(title, f"{where} may not be read")]
    return check_configuration((asked[0].get("data") or {}).get(CONFIG_KEY, ""), where)


async def _admission(server: ApiServer) -> list[Check]:
    policies, bindings, webhooks = [await _listed(server, f"{_ADMISSION}/{kind}") for kind in ADMISSION_KINDS]
    if policies is None or bindings is None:
        return [unread("admission policy V1", "admission policies may not be read")]
    found, namespaces = [checks.policy(policies, bindings)], await _all(server, "namespaces")
    if webhooks is None or namespaces is None:
        return [*found, unread("webhook", "webhook configurations or namespaces may not be read")]
    webhook = next((one for one in webhooks if one["metadata"]["name"] == CONFIGURATION), None)
    managed = [one["metadata"] for one in namespaces if checks.managed(one)]
    return [*found, *checks.line(policies, bindings, webhook, sorted(meta["name"] for meta in managed))]


async def _listed(server: ApiServer, path: str) -> list[Object] | None:
    """Return what a path lists: nothing where the API server has no such kind, None where it may not be read."""
    try:
        asked = await _allowed(server.ask(path))
    except NotFound:
        return []
    return asked[0]["items"] if asked else None


async def _lease(server: ApiServer, namespace: str, now_us: int) -> Check:
    try:
        lease = await _allowed(server.get("leases", namespace, LEASE))
    except NotFound:
        return checks.lease(None, checks.now_utc(now_us))
    if lease is None:
        return unread("lease", "the Lease may not be read")
    return checks.lease(lease, checks.now_utc(now_us))


def _api(url: str) -> Check:
    try:
        unready = Api(url).ready()
    except UnreachableError as error:
        do = "forward its port (kubectl -n tessera-system port-forward deployment/tessera 8080), or name it with --api"
        return Check("Tessera's API", "warn", str(error).partition(";")[0], do)
    if unready:
        return Check("Tessera's API", "fail", f"not ready: {unready}", "wait, or look at what it names")
    return Check("Tessera's API", "ok", f"{url} is ready")
