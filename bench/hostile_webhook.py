"""AdmissionReviews that nobody should send, by seed, and what an answer to them must look like.

Invariant: some bodies are sent again later, and the webhook's answer must be the same bytes: it remembers nothing.
"""

from __future__ import annotations

import base64
import binascii
import copy
import ssl
from typing import Any

import orjson

from bench.hostile_bodies import GARBAGE, Attacker, Sent

Json = dict[str, Any]

WORDS = (
    ("annotations", "gpu-fraction", "0.5"),
    ("annotations", "gpu-memory", "4096"),
    ("annotations", "gpu-fraction-num-devices", "2"),
    ("annotations", "tessera.dev/gpu-milli", "250"),
    ("annotations", "kubernetes.io/config.mirror", "x"),
    ("labels", "tessera.dev/queue", "vision"),
    ("limits", "nvidia.com/gpumem", "3000"),
    ("limits", "nvidia.com/gpumem-percentage", "30"),
    ("limits", "nvidia.com/gpucores", "30"),
    ("limits", "nvidia.com/mig-1g.10gb", "1"),
    ("limits", "tessera.dev/share", "1"),
)
SIZES = (400_000, 520_000, 525_000, 600_000, 2_000_000)  # around the limit of 512 KiB
KEPT = 500
PARTS = ("/metadata/annotations", "/metadata/labels", "/spec/schedulerName", "/spec/schedulingGates")


def trusting() -> ssl.SSLContext:
    """Return a client's context that takes any certificate: who listens is not in question here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class ReviewAttacker(Attacker):
    """Makes requests to kube-apiserver's port."""

    def __init__(self, seed: int, pods: list[Json], names: list[str]) -> None:
        """Keep what real bodies are made of."""
        super().__init__(seed, pods, names)
        self._again: list[Sent] = []

    def webhook(self) -> Sent:
        """Return a request; one in fifty is one that was sent before."""
        draw = self._rng.random()
        if draw < 0.01:
            return Sent(self._rng.choice(GARBAGE), "", b"", framed=False)
        if draw < 0.03 and self._again:
            return self._rng.choice(self._again)
        if draw < 0.035:
            body = self._large(self._rng.choice(SIZES))
        else:
            weights, ways = zip(*self._ways, strict=True)
            body = self._rng.choices(ways, weights)[0](self._real(""))
        sent = Sent(self._post("/mutate?timeout=2s", body), "webhook", body)
        if len(self._again) < KEPT and b"Content-Encoding" not in sent.wire:
            self._again.append(sent)
        return sent

    def largest_review(self) -> Sent:
        """Return a review that is far too large."""
        body = self._large(SIZES[-1])
        return Sent(self._post("/mutate", body), "webhook", body)

    def _real(self, verb: str) -> Json:
        """Return a review of a new pod with a few words of HAMi, KAI or Tessera; whatever verb of the extender."""
        del verb
        pod = copy.deepcopy(self._rng.choice(self._pods))
        container = pod["spec"]["containers"][0]["resources"]
        for part, key, value in self._rng.sample(WORDS, self._rng.randint(0, 3)):
            if part == "limits":
                container["limits"] = container["requests"] = {**container["limits"], key: value}
            else:
                pod["metadata"].setdefault(part, {})[key] = value
        request = {
            "uid": f"{self._rng.getrandbits(64):016x}",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "operation": self._rng.choice(("CREATE", "CREATE", "CREATE", "CREATE", "UPDATE", "DELETE")),
            "userInfo": {"username": "ada", "groups": ["system:authenticated"]},
            "object": pod,
        }
        return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}

    def _large(self, size: int) -> bytes:
        real = self._real("")
        real["request"]["object"]["metadata"].setdefault("annotations", {})["x"] = "y" * size
        return orjson.dumps(real)


class ReviewOracle:
    """Says what is wrong with an answer, knowing only the protocol and what it has seen before."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._seen: dict[bytes, tuple[int, bytes]] = {}

    def mistake(self, sent: Sent, status: int, body: bytes) -> str:
        """Return what is wrong, empty when nothing is.

        Args:
            sent: the request.
            status: of the answer.
            body: of the answer.
        """
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return f"status {status} without JSON"
        if b"Content-Encoding" not in sent.wire:
            before = self._seen.get(sent.body)
            if before is not None and before != (status, body):
                return "another answer than to the same body before"
            if len(self._seen) < 2 * KEPT:
                self._seen[sent.body] = (status, body)
        if status != 200:
            return "" if answer.get("code") and answer.get("detail") else f"status {status} without a sentence"
        return _mistaken_review(sent, answer)


def _mistaken_review(sent: Sent, answer: Json) -> str:
    """Say what is wrong with an AdmissionReview."""
    response = answer.get("response") or {}
    try:
        asked = orjson.loads(sent.body)["request"]["uid"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return "an answer to what is no review"
    if answer.get("kind") != "AdmissionReview" or response.get("uid") != asked:
        return "not an answer to this review"
    if response.get("allowed") is not True:
        said = response.get("allowed") is False and (response.get("status") or {}).get("message")
        return "" if said else "neither allowed nor refused with a sentence"
    return _mistaken_patch(response.get("patch", ""))


def _mistaken_patch(patch: str) -> str:
    """Say what is wrong with a patch: it only ever adds, and only where the webhook has something to say."""
    try:
        operations = orjson.loads(base64.b64decode(patch, validate=True)) if patch else []
    except (binascii.Error, orjson.JSONDecodeError):
        return "a patch that cannot be read"
    for operation in operations:
        path = str(operation.get("path"))
        if operation.get("op") != "add" or not (path in PARTS or path.endswith("/resources")):
            return f"a patch that does {operation.get('op')} at {path}"
    return ""
