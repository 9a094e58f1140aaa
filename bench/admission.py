"""`bench admission`: every new pod of a table on a real API server, while the webhook is up and while it is down.

What is under test is what ships: the webhook configuration and the policies of `deploy/`, and `tessera serve` under the
rights of its own account, certificate included. The table, `bench/admission.yaml`, is the oracle: each answer must be
exactly what it says, and the pod that the API server stored is looked at, not what the webhook answered.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from bench.apiclient import ApiClient, Json, Reply
from bench.errors import BenchError
from bench.manifests import apply, pick, read_base
from bench.product import Product
from bench.realcluster import DEVELOPER, KUBELET, TESSERA, RealCluster
from scheduler.clock import RealClock

TABLE = Path(__file__).with_name("admission.yaml")
HOLD, QUEUE, OURS = "tessera.dev/hold", "tessera.dev/queue", "tessera"
MANAGED, PLAIN = "managed", "plain"
SENTENCES = {"V1": "only Tessera may set", "V3": "create the pod again in a moment"}
ACTS_S = 30.0
LEAST = 60
CLOCK = RealClock()
Say = Callable[[str], None]


class AdmissionError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One pod of the table.

    Attributes:
        name: unique.
        section: of the table.
        namespace: `managed` or `plain`.
        by: who creates it: `developer` or `kubelet`.
        pod: what is sent.
        up, down: what must happen while the webhook is up and down: `held`, `as is`, or ways to be refused.
        becomes: limits and annotations of a held pod that asks in foreign words; None = they stay.
    """

    name: str
    section: str
    namespace: str
    by: str
    pod: Json
    up: str
    down: str
    becomes: Json | None = None


def read_table(path: Path = TABLE) -> list[Case]:
    """Return the cases in the table's order."""
    sections: dict[str, Json] = yaml.safe_load(path.read_text())
    return [
        Case(
            name=row["name"],
            section=section,
            namespace=row.get("namespace", table.get("namespace", MANAGED)),
            by=row.get("by", DEVELOPER),
            pod=_pod(row),
            up=row.get("up", table.get("up")),
            down=row.get("down", table.get("down")),
            becomes=row.get("becomes"),
        )
        for section, table in sections.items()
        for row in table["cases"]
    ]


def _pod(row: Json) -> Json:
    """Return the pod that a row means."""
    if "pod" in row:
        pod: Json = {"apiVersion": "v1", "kind": "Pod", **row["pod"]}
        return {**pod, "metadata": {**pod["metadata"], "generateName": "case-"}}
    spec: Json = {"containers": [_container("main", row.get("limits"))]}
    if "second" in row:
        spec["containers"].append(_container("second", row["second"]))
    early = [_container("init", row["init"])] if "init" in row else []
    early += [{**_container("sidecar", row["sidecar"]), "restartPolicy": "Always"}] if "sidecar" in row else []
    spec |= {"initContainers": early} if early else {}
    spec |= {key: row[word] for key, word in (("schedulerName", "scheduler"), ("nodeName", "node")) if word in row}
    spec |= {"schedulingGates": [{"name": gate} for gate in row["gates"]]} if "gates" in row else {}
    meta: Json = {"generateName": "case-", "annotations": row.get("notes", {}), "labels": row.get("labels", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def _container(name: str, limits: Json | None) -> Json:
    return {"name": name, "image": "pause:3.10", "resources": {"limits": limits, "requests": limits} if limits else {}}


def judge(case: Case, expected: str, reply: Reply) -> str:
    """Return what is wrong with an answer of the API server, empty when it is what the table says."""
    if expected not in {"held", "as is"}:
        sentences = [SENTENCES.get(word, f"denied the request: {word}: ") for word in expected.split(" or ")]
        if reply.status == 422 and any(sentence in reply.message for sentence in sentences):
            return ""
        return f"refused by {expected} expected, got {reply.status} {reply.message}"
    if reply.status != 201:
        return f"{expected} expected, got {reply.status} {reply.message}"
    sent, made = case.pod, reply.body
    scheduler, gates, labels = _line(made)
    scheduler_sent, gates_sent, labels_sent = _line(sent)
    limits, notes = _asked(sent)
    if expected == "held":
        labels_sent = {QUEUE: "default", **labels_sent}
        gates_sent = [*gates_sent, *([] if HOLD in gates_sent else [HOLD])]
        scheduler_sent = OURS
        if case.becomes is not None:
            limits, notes = case.becomes["limits"], case.becomes["notes"]
    for what, found, wanted in (
        ("schedulerName", scheduler, scheduler_sent),
        ("gates", gates, gates_sent),
        ("labels", labels, labels_sent),
        ("annotations", _asked(made)[1], notes),
        ("resources", sorted(_asked(made)[0]), sorted(limits)),
    ):
        if found != wanted:
            return f"{what} {wanted} expected, got {found}"
    return _amounts(case, made)


def _amounts(case: Case, made: Json) -> str:
    """Say whether limits and requests that were translated are as the table has them."""
    resources = made["spec"]["containers"][0].get("resources", {})
    if case.becomes is None or resources.get("limits") == resources.get("requests") == case.becomes["limits"]:
        return ""
    return f"limits and requests {case.becomes['limits']} expected, got {resources}"


def _line(pod: Json) -> tuple[str, list[str], Json]:
    """Return scheduler, gates and labels."""
    gates = [gate["name"] for gate in pod["spec"].get("schedulingGates", ())]
    return pod["spec"].get("schedulerName", "default-scheduler"), gates, pod["metadata"].get("labels") or {}


def _asked(pod: Json) -> tuple[Json, Json]:
    """Return the first container's limits, and the annotations."""
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits") or {}
    return limits, pod["metadata"].get("annotations") or {}


@dataclass(slots=True)
class Tally:
    """What was counted; `texts` say each mismatch."""

    accepted: int = 0
    denied: int = 0
    non_gpu_blocked: int = 0
    unmanaged_admitted: int = 0
    texts: list[str] = field(default_factory=list)

    def count(self, case: Case, phase: str, reply: Reply) -> None:
        """Judge one answer and count it; only what the table says counts as accepted or denied."""
        expected = case.up if phase == "up" else case.down
        problem = judge(case, expected, reply)
        admitted = reply.status == 201
        if problem:
            self.texts.append(f"{case.section} / {case.name}, webhook {phase}: {problem}")
        elif admitted:
            self.accepted += 1
        else:
            self.denied += 1
        if case.section == "cpu-only" and not admitted:
            self.non_gpu_blocked += 1
        if case.section in {"held", "refused"} and admitted:
            scheduler, gates, _ = _line(reply.body)
            self.unmanaged_admitted += scheduler != OURS or HOLD not in gates

    def report(self, seed: int) -> Json:
        """Return the bench's object."""
        clean = not (self.texts or self.non_gpu_blocked or self.unmanaged_admitted)
        return {
            "accepted": self.accepted,
            "denied": self.denied,
            "mismatches": len(self.texts),
            "non_gpu_blocked": self.non_gpu_blocked,
            "unmanaged_admitted": self.unmanaged_admitted,
            "checked": self.accepted + self.denied + len(self.texts),
            "seed": seed,
            "ok": clean and min(self.accepted, self.denied) >= LEAST,
        }


def called_at(url: str) -> Json:
    """Return the shipped webhook configuration with nothing replaced but where it is called."""
    shipped = pick(read_base(), "MutatingWebhookConfiguration", "tessera")
    return {**shipped, "webhooks": [{**one, "clientConfig": {"url": url}} for one in shipped["webhooks"]]}


async def prepare(api: ApiClient) -> None:
    """Make the two namespaces, let the developer work in them, and wait until policy V3 acts."""
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": DEVELOPER}}
    subresources = ("pods", "pods/status", "pods/resize", "pods/ephemeralcontainers")
    verbs = ["create", "get", "list", "patch", "update", "delete"]
    bound = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": DEVELOPER}
    user = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": DEVELOPER}
    await apply(
        api,
        [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": PLAIN}},
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": MANAGED, "labels": {"tessera.dev/managed": "true"}},
            },
            {**role, "rules": [{"apiGroups": [""], "resources": list(subresources), "verbs": verbs}]},
            {**role, "kind": "ClusterRoleBinding", "roleRef": bound, "subjects": [user]},
        ],
    )

    async def refused() -> bool:
        return SENTENCES["V3"] in (await _try(api)).message

    await until(refused, "policy V3 does not act")


async def acts(api: ApiClient, url: str) -> None:
    """Send new pods to this URL, and wait until a GPU pod is held."""
    await apply(api, [called_at(url)])

    async def held() -> bool:
        reply = await _try(api)
        return reply.status == 201 and HOLD in _line(reply.body)[1]

    await until(held, "kube-apiserver does not call the webhook")


async def _try(api: ApiClient) -> Reply:
    """Create a GPU pod, but not really."""
    pod = _pod({"limits": {"nvidia.com/gpu": "1"}})
    return await api.ask("POST", f"/api/v1/namespaces/{MANAGED}/pods?dryRun=All", pod)


async def until(done: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Ask again and again.

    Raises:
        AdmissionError: it took too long.
    """
    deadline = time.monotonic() + ACTS_S
    while not await done():
        if time.monotonic() > deadline:
            raise AdmissionError(f"{otherwise} after {ACTS_S:.0f} s")
        await CLOCK.sleep(0.1)


async def run_admission(seed: int, say: Say) -> Json:
    """Create every pod of the table twice and return the report.

    Args:
        seed: of the order.
        say: takes one line of progress.

    Raises:
        AdmissionError, ProductError: the run could not be finished.
        UnavailableError: there is no control plane.
    """
    cases, tally = read_table(), Tally()
    Random(seed).shuffle(cases)
    async with RealCluster() as cluster, cluster.client() as api:
        product = Product(cluster.folder, cluster.kubeconfig(TESSERA), flags=["--webhook=127.0.0.1:0"])
        try:
            await prepare(api)
            await product.start()
            await acts(api, product.webhook)
            say(f"{len(cases)} pods while the webhook is up")
            await _create(cluster, cases, "up", tally)
            product.check()
            await product.kill()
            say(f"{len(cases)} pods while it is down")
            await _create(cluster, cases, "down", tally)
        finally:
            await product.kill()
    for text in tally.texts:
        say(text)
    return tally.report(seed)


async def _create(cluster: RealCluster, cases: list[Case], phase: str, tally: Tally) -> None:
    async with cluster.client(DEVELOPER) as developer, cluster.client(KUBELET) as kubelet:
        users: dict[str, Any] = {DEVELOPER: developer, KUBELET: kubelet}
        for case in cases:
            reply = await users[case.by].ask("POST", f"/api/v1/namespaces/{case.namespace}/pods", case.pod)
            tally.count(case, phase, reply)
