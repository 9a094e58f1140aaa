"""Bodies that hypothesis makes up: pods, filter arguments and bind bodies, and JSON that is barely JSON, as bytes.

A strategy here draws bytes, not objects: only so can a body hold a key twice, a number no float can keep, half of a
surrogate pair or `NaN`. Invariant: the same seed draws the same bodies, and no more than `BATCH` are kept at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]

BATCH = 20
ALL = tuple(HealthCheck)  # slow and large ones are what is wanted
BODY_MAX = 1 << 18  # bytes of one drawn body, but for those of very many names
MANY = (50_001, 200_000, 1_000_000)  # names in one body
MARK = b'"\\u0000@"'  # a text of its own, in whose place `broken` puts what is no JSON
FATES = 20  # of an object; in all but these four nothing is odd about it
LEFT_OUT, ANYTHING, TWICE, MARKED = range(1, 5)
RESOURCES = (
    "cpu",
    "memory",
    "ephemeral-storage",
    "nvidia.com/gpu",
    "nvidia.com/mig-1g.10gb",
    "nvidia.com/mig-7g.80gb",
    "tessera.dev/share",
    "example.com/dongle",
)
ODD_QUANTITY = r"[+-]?[0-9]{0,30}\.?[0-9]{0,30}([eE][+-]?[0-9]{1,9}|[a-zA-Z]{0,3})"
SETTINGS = ("gpu-memory", "gpu-milli", "gpu-model", "max-runtime", "gang", "gang-size", "class", "allocation")


def written(value: object) -> bytes:
    """Return a value as JSON of plain ASCII; a lone surrogate as its escape."""
    return json.dumps(value).encode()


def one(*strategies: Bytes) -> Bytes:
    """Draw from one of these."""
    return st.one_of(*strategies)


def fixed(*values: object) -> Bytes:
    """Draw one of these values."""
    return st.sampled_from([written(value) for value in values])


def rare(values: Bytes) -> Bytes:
    """Draw null, and now and then one of these."""
    return one(*[st.just(b"null")] * 2, values)


def array(items: Bytes, most: int = 2) -> Bytes:
    """Draw a list."""
    return st.lists(items, max_size=most).map(lambda found: b"[" + b",".join(found) + b"]")


def pairs(keys: Bytes, values: Bytes, most: int = 3) -> Bytes:
    """Draw an object, whose keys may come twice."""
    return st.lists(st.tuples(keys, values), max_size=most).map(_object)


@st.composite
def record(draw: st.DrawFn, /, **fields: Bytes) -> bytes:
    """Draw an object of these fields; in a few one is left out, is anything, comes twice, or is no JSON later."""
    found: list[tuple[bytes, bytes]] = []
    fate, chosen = divmod(draw(st.integers(0, FATES * len(fields) - 1)), len(fields))
    for place, (key, values) in enumerate(fields.items()):
        odd = fate if place == chosen else 0
        if odd == LEFT_OUT:
            continue
        value = draw(JSON) if odd == ANYTHING else MARK if odd == MARKED else draw(values)
        found.append((written(key), value))
        if odd == TWICE:
            found.append((written(key), draw(JSON)))
    return _object(found)


def _object(found: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"{" + b",".join(key + b":" + value for key, value in found) + b"}"


def _deep(depth: int, ends: tuple[bytes, bytes], core: bytes) -> bytes:
    return ends[0] * depth + core + ends[1] * depth


TEXT = one(
    st.text(max_size=12).map(written),
    st.text(max_size=12).map(lambda text: json.dumps(text, ensure_ascii=False).encode()),
    st.text(st.characters(categories=["Cc", "Cf", "Mn", "Nd"]), min_size=1, max_size=4).map(written),
    st.sampled_from([1, 2, 2, 2, 3, 4]).map(lambda power: b'"' + b"a" * 10**power + b'"'),
)
NUMBER = one(
    st.integers().map(written),
    st.floats(allow_nan=False, allow_infinity=False).map(written),
    st.tuples(st.sampled_from([1, -1]), st.integers(15, 300)).map(lambda pair: written(pair[0] * 10 ** pair[1])),
)
BRACKETS = [(b"[", b"]"), (b'{"a":', b"}"), (b'{"spec":[', b"]}")]
DEEP = st.builds(_deep, st.sampled_from([2, 100, 400]), st.sampled_from(BRACKETS), one(NUMBER, TEXT))
LEAF = one(NUMBER, TEXT, st.sampled_from([b"null", b"true", b"false", b"[]", b"{}", MARK]))
JSON: Bytes = st.recursive(LEAF, lambda inner: array(inner) | pairs(TEXT, inner), max_leaves=8) | DEEP

BAD = one(
    st.sampled_from([b"NaN", b"Infinity", b"-Infinity"]),
    st.sampled_from([b"1e400", b"01", b"+1", b"1.", b".5", b"1e", b"0x1"]),
    st.sampled_from([b"nul", b"", b"'x'", b"undefined", b'"\xff"', b'"\xed\xa0\x80"', b'"\\x"', b'"\n"', b'"']),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=3).map(written),  # halves of surrogate pairs
    st.builds(
        _deep, st.sampled_from([900, 1100, 100_000]), st.sampled_from([*BRACKETS, (b"[", b""), (b"", b"]")]), NUMBER
    ),
    st.integers(400, 4000).map(lambda power: written(10**power)),
)

NAME = one(fixed("a", "pod-1", "default", "held-1", "gpu-00001", "x" * 253, "x" * 254, "UPPER", "a b"), TEXT)
QUANTITY = one(
    st.tuples(st.integers(0, 300), st.sampled_from(["", "m", "u", "n", "k", "Ki", "Mi", "Gi", "Ti", "Ei", "e3"])).map(
        lambda drawn: written(f"{drawn[0]}{drawn[1]}")
    ),
    st.from_regex(ODD_QUANTITY, fullmatch=True).map(written),
    NUMBER,
)
AMOUNTS = pairs(one(fixed(*RESOURCES), TEXT), QUANTITY)
LABELS = pairs(one(fixed("a", "tessera.dev/queue", "tessera.dev/request"), TEXT), TEXT)
ANNOTATIONS = pairs(
    fixed(*(f"tessera.dev/{name}" for name in SETTINGS)), one(QUANTITY, TEXT, JSON.map(repr).map(written))
)
OPERATOR = fixed("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Equal", "")
EXPRESSION = record(key=fixed("a", "nvidia.com/gpu.product", "metadata.name"), operator=OPERATOR, values=array(NAME))
TERM = record(matchExpressions=array(EXPRESSION), matchFields=rare(array(EXPRESSION)))
REQUIRED = record(requiredDuringSchedulingIgnoredDuringExecution=record(nodeSelectorTerms=array(TERM)))
TOLERATION = record(key=NAME, operator=OPERATOR, value=TEXT, effect=fixed("NoSchedule", "NoExecute", ""))
CONTAINER = record(
    name=NAME, image=TEXT, restartPolicy=fixed("Always", "Never"), resources=record(requests=AMOUNTS, limits=AMOUNTS)
)
STATUS = record(
    phase=fixed("Pending", "Running", "Failed", ""), containerStatuses=array(record(name=NAME)), conditions=JSON
)


def pods(uids: Sequence[str]) -> Bytes:
    """Draw a pod: of kube-scheduler's shape, each part of it mostly what belongs there.

    Args:
        uids: of pods that exist; some drawn ones claim to be one of them.
    """
    owner = record(uid=TEXT, kind=NAME, name=NAME, controller=st.just(b"true"))
    times = fixed("2026-01-01T00:00:00Z", "2026-13-41T99:00:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:60+99:99")
    meta = record(
        name=NAME,
        namespace=NAME,
        uid=one(fixed(*uids), TEXT),
        resourceVersion=one(fixed("1", "247", ""), TEXT),
        creationTimestamp=one(times, TEXT),
        labels=LABELS,
        annotations=ANNOTATIONS,
        ownerReferences=rare(array(owner)),
    )
    spec = record(
        schedulerName=fixed("tessera", "default-scheduler"),
        nodeName=fixed("", "gpu-00001"),
        containers=array(CONTAINER),
        initContainers=rare(array(CONTAINER)),
        overhead=rare(AMOUNTS),
        resources=rare(record(requests=AMOUNTS)),
        nodeSelector=rare(LABELS),
        affinity=rare(record(nodeAffinity=REQUIRED)),
        tolerations=rare(array(TOLERATION)),
        priority=NUMBER,
        resourceClaims=rare(array(record(name=NAME))),
        schedulingGates=rare(array(record(name=NAME))),
    )
    return record(apiVersion=fixed("v1"), kind=fixed("Pod"), metadata=meta, spec=spec, status=rare(STATUS))


def filters(uids: Sequence[str], names: Sequence[str]) -> Bytes:
    """Draw a body of /filter or /prioritize: a drawn pod, and nodes that exist or do not."""
    offered = array(one(fixed(*names), NAME), most=30)
    return record(Pod=pods(uids), Nodes=st.just(b"null"), NodeNames=offered)


def binds(uids: Sequence[str], names: Sequence[str]) -> Bytes:
    """Draw a body of /bind."""
    return record(PodName=NAME, PodNamespace=NAME, PodUID=one(fixed(*uids), TEXT), Node=one(fixed(*names), NAME))


@st.composite
def broken(draw: st.DrawFn, /, bodies: Bytes) -> bytes:
    """Draw bodies of which half are as drawn; the rest is cut off, holds what is no JSON, goes on, or is anything."""
    body = draw(bodies)
    match draw(st.integers(0, 7)):
        case 7:
            body = body[: -draw(st.integers(1, max(1, len(body))))]
        case 6 | 5:
            body = body.replace(MARK if MARK in body else b"null", draw(BAD))
        case 4:
            body = draw(one(JSON, BAD, bodies.map(lambda more: body + more)))
    return body[:BODY_MAX]


def crowds(uids: Sequence[str]) -> Bytes:
    """Draw a body of /filter with very many names, up to a million."""
    name = st.sampled_from([b'"n"', b'""', b'"gpu-00001"', b'"\xc3\xa9"', b'"\\ud800"', b"1", b"null", b"[]"])

    def body(pod: bytes, name: bytes, other: bytes, count: int) -> bytes:
        return b'{"Pod":' + pod + b',"NodeNames":[' + other + (b"," + name) * (count - 1) + b"]}"

    return st.builds(body, pods(uids), name, name, st.sampled_from(MANY))


def drawn(bodies: Bytes, seed: int, batch: int = BATCH) -> Iterator[bytes]:
    """Yield bodies without end, the same ones for the same seed.

    Args:
        bodies: what to draw from.
        seed: of all of them.
        batch: how many are drawn, and kept, at a time.
    """
    while True:
        kept: list[bytes] = []

        @seeded(seed)
        @settings(max_examples=batch, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=ALL)
        @given(bodies)
        def keep(body: bytes) -> None:
            kept.append(body)  # noqa: B023 - called before the next turn

        keep()
        yield from kept
        seed += 1_000_003  # the same seed would draw the same batch
