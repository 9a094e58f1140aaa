"""Requests nobody should send: bodies of kube-scheduler broken in every way JSON and HTTP allow, and made-up ones.

What is made up comes from hypothesis. Invariant: the same seed gives the same requests. None of them is one that may
rightly change anything durable: binds name pods that run, wait for what is not there, or do not exist.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from bench.hostile_strategies import MANY, binds, broken, crowds, drawn, filters

Json = dict[str, Any]

VERBS = ("filter", "filter", "filter", "prioritize", "bind")
SURROGATES = ("\ud800", "\udfff", "a\udc80b")
STRANGE = ("", "\0", "\u202e", "💥" * 50, "é" * 300, "../../etc/passwd", "%00", "' OR 1=1 --", "{{7*7}}", "A" * 100_000)
HUGE = (10**400, -(10**400), 2**63, -(2**63) - 1, 2**64, 1e308, -0.0, 5e-324, 10**19)
QUANTITIES = ("9" * 5000, "1e999", "-1", "1E", "0x10", "1Ki1", "NaN", "1.5.5", "10000000000Ei", "1e-999999999", "٣")
JUNK: tuple[object, ...] = (None, True, False, 0, -1, "", [], {}, [[]], {"": None}, "x", 1.5)
TOKENS = (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"01", b"+1", b"nul", b"'x'", b"\xff", b"0x1", b"undefined")
QUERIES = ("limit", "cursor", "state", "queue", "namespace", "name", "", "limit[]", "\0")
VALUES = ("0", "-1", "500", "9" * 400, "nan", "====", "e30=")
PATHS = ("nodes", "gpus", "requests", "requests/{id}", "requests/{id}/explanation", "nodes/{id}", "{id}", "")
METHODS = ("GET", "GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO")
NO_HTTP, CROWDED, MADE_UP = 0.01, 0.0005, 0.2  # of all requests to the extender
GARBAGE = (
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /scheduler/filter HTTP/9.9\r\n\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\n" + b"X: y\r\n" * 40_000 + b"\r\n",
    b"POST /scheduler/filter HTTP/1.1\r\nX\0Y: z\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as bytes; `framed` says that HTTP itself is in order, so an answer is owed. `verb` empty = none."""

    wire: bytes
    verb: str
    body: bytes
    framed: bool = True


class Attacker:
    """Makes requests one after the other from one seeded source."""

    def __init__(self, seed: int, pods: list[Json], names: list[str]) -> None:
        """Keep what real bodies are made of: pods that run or can never run, and node names."""
        self._rng = Random(seed)
        self._pods, self._names = pods, names
        uids = [pod["metadata"]["uid"] for pod in pods]
        asking = drawn(broken(filters(uids, names)), 3 * seed)
        self._made_up = {
            "filter": asking,
            "prioritize": asking,
            "bind": drawn(broken(binds(uids, names)), 3 * seed + 1),
        }
        self._crowds = drawn(crowds(uids), 3 * seed + 2, batch=2)
        self._ways: list[tuple[int, Callable[[Json], bytes]]] = [
            (8, self._plain),
            (10, self._truncated),
            (20, self._replaced),
            (10, self._quantities),
            (8, self._texts),
            (5, self._surrogates),
            (4, self._deep),
            (8, self._duplicate_keys),
            (8, self._tokens),
            (6, self._without),
            (8, self._flipped),
            (3, self._random),
            (2, self._spliced),
        ]

    def extender(self) -> Sent:
        """Return a request to kube-scheduler's port."""
        draw = self._rng.random()
        if draw < NO_HTTP:
            return Sent(self._rng.choice(GARBAGE), "", b"", framed=False)
        verb = self._rng.choice(VERBS)
        if draw < NO_HTTP + CROWDED:
            body = next(self._crowds) if self._rng.random() < 0.5 else self._many_names(self._rng.choice(MANY))
        elif draw < NO_HTTP + CROWDED + MADE_UP:
            body = next(self._made_up[verb])
        else:
            weights, ways = zip(*self._ways, strict=True)
            body = self._rng.choices(ways, weights)[0](self._real(verb))
        return Sent(self._post(f"/scheduler/{verb}", body), verb, body)

    def largest(self) -> Sent:
        """Return a request of a million names."""
        body = self._many_names(1_000_000)
        return Sent(self._post("/scheduler/filter", body), "filter", body)

    def api(self) -> Sent:
        """Return a request to people's port."""
        if self._rng.random() < 0.01:
            return Sent(self._rng.choice(GARBAGE), "", b"", framed=False)
        text = "".join(self._rng.choices("abc-_.~%20%ff%00/?&=:@!$'()*+,;[]éÿ", k=self._rng.randint(0, 40)))
        path = self._rng.choice(PATHS).replace("{id}", self._rng.choice([text, "held-1", "%00", "x" * 3000]))
        pairs = [
            f"{self._rng.choice(QUERIES)}={self._rng.choice([text, *VALUES])}" for _ in range(self._rng.randint(0, 4))
        ]
        target = f"/api/v1/{path}?{'&'.join(pairs)}".encode("latin-1", "replace").replace(b" ", b"+")
        target = bytes(byte for byte in target if byte > 32 and byte != 127)
        body = self._random({}) if self._rng.random() < 0.1 else b""
        method = self._rng.choice(METHODS)
        head = b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (method.encode(), target, len(body))
        return Sent(head + body, "HEAD" if method == "HEAD" else "api", body)

    def _post(self, path: str, body: bytes) -> bytes:
        more = "Content-Encoding: gzip\r\n" if self._rng.random() < 0.01 else ""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def _real(self, verb: str) -> Json:
        pod = copy.deepcopy(self._rng.choice(self._pods))
        meta = pod["metadata"]
        if verb == "bind":
            args = {"PodName": meta["name"], "PodNamespace": meta["namespace"], "PodUID": meta["uid"]}
            return {**args, "Node": self._rng.choice(self._names)}
        count = self._rng.randint(0, len(self._names))
        return {"Pod": pod, "Nodes": None, "NodeNames": self._rng.sample(self._names, count)}

    # the ways

    def _plain(self, real: Json) -> bytes:
        return json.dumps(real).encode()

    def _truncated(self, real: Json) -> bytes:
        whole = self._plain(real)
        return whole[: self._rng.randint(0, len(whole))]

    def _replaced(self, real: Json) -> bytes:
        """Put things of another type in some places."""
        for _ in range(self._rng.randint(1, 3)):
            self._set(real, self._rng.choice([*JUNK, *HUGE]))
        return json.dumps(real).encode()

    def _quantities(self, real: Json) -> bytes:
        self._set(real, self._rng.choice([*QUANTITIES, *HUGE]), only=("cpu", "memory", "gpu", "share", "mig", "milli"))
        return json.dumps(real).encode()

    def _texts(self, real: Json) -> bytes:
        self._set(real, self._rng.choice(STRANGE))
        return json.dumps(real, ensure_ascii=self._rng.random() < 0.5).encode()

    def _surrogates(self, real: Json) -> bytes:
        self._set(real, self._rng.choice(SURROGATES))
        if self._rng.random() < 0.5:
            return json.dumps(real).encode()
        return json.dumps(real, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _deep(self, real: Json) -> bytes:
        depth = self._rng.choice([10, 900, 1100, 100_000])
        opened, closed = self._rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        self._set(real, "@@")
        return json.dumps(real).encode().replace(b'"@@"', opened * depth + b"1" + closed * depth, 1)

    def _duplicate_keys(self, real: Json) -> bytes:
        whole = self._plain(real)
        key, value = self._rng.choice(list(real.items()))
        junk = self._rng.choice([value, *JUNK])
        return whole[:-1] + b"," + json.dumps({key: junk}).encode()[1:]

    def _tokens(self, real: Json) -> bytes:
        self._set(real, "@@")
        return json.dumps(real).encode().replace(b'"@@"', self._rng.choice(TOKENS), 1)

    def _without(self, real: Json) -> bytes:
        holder, key = self._rng.choice(_places(real))
        del holder[key]
        return json.dumps(real).encode()

    def _flipped(self, real: Json) -> bytes:
        whole = bytearray(self._plain(real))
        for _ in range(self._rng.randint(1, 8)):
            whole[self._rng.randrange(len(whole))] ^= 1 << self._rng.randrange(8)
        return bytes(whole)

    def _random(self, _: Json) -> bytes:
        return self._rng.randbytes(self._rng.choice([0, 1, 10, 1000, 70_000]))

    def _spliced(self, real: Json) -> bytes:
        one, other = self._plain(real), self._plain(self._real(self._rng.choice(VERBS)))
        return one[: self._rng.randrange(len(one))] + other[self._rng.randrange(len(other)) :]

    def _many_names(self, count: int) -> bytes:
        real = self._real("filter")
        whole = self._plain({**real, "NodeNames": []})
        return whole.replace(b'"NodeNames": []', b'"NodeNames":["n"' + b',"n"' * (count - 1) + b"]")

    def _set(self, tree: Json, value: object, only: tuple[str, ...] = ()) -> None:
        """Put a value in some place of a body; `only` where the key says one of these words, if there is one."""
        places = _places(tree)
        fit = [place for place in places if any(word in str(place[1]) for word in only)]
        holder, key = self._rng.choice(fit or places)
        holder[key] = copy.deepcopy(value)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every place of a JSON tree that has a holder, as holder and key."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        holder = todo.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list) and holder[key]:
                todo.append(holder[key])
    return found
