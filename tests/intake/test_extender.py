"""Bodies as kube-scheduler sends them, and what is said of all others."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import Kind
from scheduler.intake.extender import BadBody, BindArgs, read_bind, read_filter

# captured from kube-scheduler 1.36.2, nodeCacheCapable: true
FILTER = (
    b'{"Pod":{"metadata":{"name":"gpu-bgrjn","generateName":"gpu-","namespace":"default",'
    b'"uid":"89eba25d-fdba-4624-9bb1-f6a37394b34d","resourceVersion":"247","generation":1,'
    b'"creationTimestamp":"2026-11-21T01:13:33Z","labels":{"tessera.dev/queue":"research"},'
    b'"annotations":{"tessera.dev/request-id":"01J"}},"spec":{"containers":[{"name":"main","image":"pause:3.10",'
    b'"resources":{"limits":{"cpu":"4","memory":"8Gi","nvidia.com/gpu":"2"},'
    b'"requests":{"cpu":"4","memory":"8Gi","nvidia.com/gpu":"2"}},"terminationMessagePath":"/dev/termination-log",'
    b'"terminationMessagePolicy":"File","imagePullPolicy":"IfNotPresent"}],"restartPolicy":"Always",'
    b'"terminationGracePeriodSeconds":30,"dnsPolicy":"ClusterFirst","securityContext":{},"schedulerName":"tessera",'
    b'"tolerations":[{"key":"node.kubernetes.io/not-ready","operator":"Exists","effect":"NoExecute",'
    b'"tolerationSeconds":300}],"priority":0,"enableServiceLinks":true,"preemptionPolicy":"PreemptLowerPriority"},'
    b'"status":{"phase":"Pending","qosClass":"Guaranteed"}},"Nodes":null,"NodeNames":["gpu-00000","gpu-00001"]}'
)
BIND = (
    b'{"PodName":"gpu-bgrjn","PodNamespace":"default","PodUID":"89eba25d-fdba-4624-9bb1-f6a37394b34d",'
    b'"Node":"gpu-00007"}'
)


def test_captured_filter_body() -> None:
    args = read_filter(FILTER)
    assert args.names == ["gpu-00000", "gpu-00001"]
    request = args.pod.request
    assert (request.id, request.queue, request.refusal) == ("89eba25d-fdba-4624-9bb1-f6a37394b34d", "research", None)
    assert (request.devices.kind, request.devices.count, request.amounts.cpu_milli) == (Kind.WHOLE, 2, 4000)
    assert args.pod.ours


def test_captured_bind_body() -> None:
    uid = "89eba25d-fdba-4624-9bb1-f6a37394b34d"
    assert read_bind(BIND) == BindArgs(name="gpu-bgrjn", namespace="default", uid=uid, node="gpu-00007")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"[" * 5000,
        b'{"Pod":{},"NodeNames":null,"Nodes":null}',
        b'{"Pod":null,"NodeNames":[]}',
        b'{"Pod":[],"NodeNames":[]}',
        b'{"Pod":{},"NodeNames":["a",1]}',
        b'{"Pod":{},"NodeNames":"a"}',
        b'{"pod":{},"nodenames":[]}',
        b"\xff",
    ],
)
def test_malformed_filter_bodies(body: bytes) -> None:
    with pytest.raises(BadBody, match="send what kube-scheduler sends") as bad:
        read_filter(body)
    assert bad.value.code == "extender.malformed"


def test_whole_nodes_tell_what_to_set() -> None:
    with pytest.raises(BadBody, match="nodeCacheCapable: true"):
        read_filter(b'{"Pod":{},"NodeNames":null,"Nodes":{"items":[]}}')


def test_empty_list_of_names_is_fine() -> None:
    assert read_filter(b'{"Pod":{},"Nodes":null,"NodeNames":[]}').names == []


@pytest.mark.parametrize("key", ["PodName", "PodNamespace", "PodUID", "Node"])
@pytest.mark.parametrize("value", [None, "", 1, ["a"]])
def test_malformed_bind_bodies(key: str, value: object) -> None:
    with pytest.raises(BadBody, match=key):
        read_bind(orjson.dumps(orjson.loads(BIND) | {key: value}))


@given(st.binary() | st.binary().map(lambda tail: FILTER[: len(FILTER) - len(tail)] + tail))
def test_any_bytes(body: bytes) -> None:
    for read in (read_filter, read_bind):
        try:
            read(body)
        except BadBody as bad:
            assert str(bad).endswith(".")  # noqa: PT017 - both outcomes are right


def test_a_known_pod_of_the_same_version_is_not_read_again() -> None:
    fresh = read_filter(FILTER).pod
    known = replace(fresh, phase="read before")
    assert read_filter(FILTER, {fresh.uid: known}).pod is known
    assert read_filter(FILTER, {"another": known}).pod == fresh
    assert read_filter(FILTER, {fresh.uid: replace(known, resource_version="1")}).pod == fresh
    bare = b'{"Pod":{"metadata":{"uid":"u","resourceVersion":%b}},"NodeNames":[]}'
    for version in (b'""', b"null", b"7", b"[]"):
        assert read_filter(bare % version, {"u": replace(known, resource_version="")}).pod is not known
