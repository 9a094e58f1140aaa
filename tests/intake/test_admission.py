"""New pods: whose they are, what the patch makes of them, and foreign words that become shares or a sentence."""

from __future__ import annotations

import base64
import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.columns import Kind
from scheduler.embedded.patching import patched
from scheduler.intake.admission import UNTOUCHED, Admission, BadReview, admit, answer, read_review
from scheduler.intake.pod import read_pod
from scheduler.model.pod import Refusal

Json = dict[str, Any]
GPU, SHARE = "nvidia.com/gpu", "tessera.dev/share"
MEM, PERCENT, CORES = "nvidia.com/gpumem", "nvidia.com/gpumem-percentage", "nvidia.com/gpucores"
HOLD = {"name": "tessera.dev/hold"}


def container(name: str = "main", **limits: object) -> Json:
    """Return a container as the API server shows it: limits without requests are requests too."""
    return {"name": name, "resources": {"limits": dict(limits), "requests": dict(limits)}}


def pod(*containers: Json, notes: Json | None = None, labels: Json | None = None, **spec: Any) -> Json:
    meta: Json = {"generateName": "p-", "namespace": "n", "creationTimestamp": None}
    meta |= {"annotations": notes} if notes is not None else {}
    meta |= {"labels": labels} if labels is not None else {}
    spec = {"schedulerName": "default-scheduler", "containers": list(containers or [container()])} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def made(raw: Json) -> Json:
    """Return the pod after its patch; judging it again must change nothing, and it must be one that can be granted."""
    before = copy.deepcopy(raw)
    admission = admit(raw)
    assert raw == before
    assert admission.refusal is None
    after = patched(raw, [dict(one) for one in admission.patch], "json")
    assert admit(after) == UNTOUCHED or admit(after) == Admission()
    assert read_pod(after).request.refusal is None
    return after


def refused(raw: Json) -> Refusal:
    admission = admit(raw)
    assert admission.patch == ()
    assert admission.refusal is not None
    assert admission.refusal.text.endswith(".")
    return admission.refusal


def held(after: Json) -> bool:
    return (
        HOLD in after["spec"]["schedulingGates"]
        and after["spec"]["schedulerName"] == "tessera"
        and "tessera.dev/queue" in after["metadata"]["labels"]
    )


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(pod(container(**{GPU: "1"})), id="a whole GPU"),
        pytest.param(pod(container(**{GPU: 2})), id="a number"),
        pytest.param(pod(container(**{"nvidia.com/mig-1g.10gb": "1"})), id="a slice"),
        pytest.param(pod(container(**{SHARE: "1"}), notes={"tessera.dev/gpu-milli": "250"}), id="a share"),
        pytest.param(pod(container(), initContainers=[container("early", **{GPU: "1"})]), id="an init container's"),
        pytest.param(pod(container(), container("other", **{GPU: "1"})), id="the second container's"),
        pytest.param(pod(schedulerName="tessera"), id="CPU-only by name"),
        pytest.param(pod(container(**{GPU: "1"}), schedulerName="kai-scheduler"), id="another scheduler's"),
    ],
)
def test_pods_of_ours_are_held(raw: Json) -> None:
    after = made(raw)
    assert held(after)
    assert after["metadata"]["labels"]["tessera.dev/queue"] == "default"
    assert after["spec"]["containers"] == raw["spec"]["containers"]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(pod(), id="CPU-only"),
        pytest.param(pod(container(**{"cpu": "1", "example.com/fpga": "2"})), id="another device"),
        pytest.param(pod(container(**{GPU: "0"})), id="no GPU at all"),
        pytest.param(pod(container(**{GPU: "1"}), nodeName="a"), id="names its node"),
        pytest.param(pod(schedulerName="tessera", nodeName="a"), id="ours that names its node"),
        pytest.param(pod(container(**{GPU: "1"}), notes={"kubernetes.io/config.mirror": "x"}), id="mirror"),
        pytest.param(pod(notes={"gpu-fraction-num-devices": "2"}), id="a count without a size"),
        pytest.param(pod(container(**{GPU: "-1"}), nodeName="a"), id="nonsense that names its node"),
    ],
)
def test_all_others_are_left_alone(raw: Json) -> None:
    assert admit(raw) == UNTOUCHED


def test_what_is_there_stays() -> None:
    raw = pod(
        container(**{GPU: "1"}),
        labels={"tessera.dev/queue": "vision", "app": "x"},
        notes={"team": "a"},
        schedulingGates=[{"name": "other"}],
    )
    after = made(raw)
    assert after["metadata"] == raw["metadata"]
    assert after["spec"]["schedulingGates"] == [{"name": "other"}, HOLD]
    assert made(after) == after
    assert admit(after).patch == ()


@pytest.mark.parametrize(
    ("limits", "share", "notes"),
    [
        ({GPU: "2", MEM: "3000"}, "2", {"tessera.dev/gpu-memory": "3000Mi"}),
        ({GPU: "1", MEM: "3k"}, "1", {"tessera.dev/gpu-memory": "3000Mi"}),
        ({MEM: "3000"}, "1", {"tessera.dev/gpu-memory": "3000Mi"}),
        ({GPU: "1", PERCENT: "25"}, "1", {"tessera.dev/gpu-milli": "250"}),
        ({GPU: "1", CORES: "30"}, "1", {"tessera.dev/gpu-milli": "300"}),
        ({GPU: "1", PERCENT: "25", CORES: "40"}, "1", {"tessera.dev/gpu-milli": "400"}),
        ({GPU: "1", PERCENT: "100"}, "1", {"tessera.dev/gpu-milli": "1000"}),
        (
            {GPU: "1", MEM: "3000", CORES: "30"},
            "1",
            {"tessera.dev/gpu-memory": "3000Mi", "tessera.dev/gpu-milli": "300"},
        ),
        ({GPU: "1", MEM: "3000", CORES: "0", "nvidia.com/priority": "0"}, "1", {"tessera.dev/gpu-memory": "3000Mi"}),
    ],
)
def test_hami_resources_become_shares(limits: Json, share: str, notes: Json) -> None:
    after = made(pod(container(cpu="1", **limits), container("plain", cpu="2")))
    assert held(after)
    assert after["metadata"]["annotations"] == notes
    changed = {"cpu": "1", SHARE: share}
    assert after["spec"]["containers"][0]["resources"] == {"limits": changed, "requests": changed}
    assert after["spec"]["containers"][1] == container("plain", cpu="2")
    assert read_pod(after).request.devices.kind is Kind.SHARE


def test_hami_words_that_say_nothing_leave_a_whole_gpu() -> None:
    after = made(pod(container(**{GPU: "1", MEM: "0", "nvidia.com/priority": "1"})))
    assert after["spec"]["containers"][0]["resources"]["limits"] == {GPU: "1"}
    assert "annotations" not in after["metadata"]
    assert admit(pod(container(**{GPU: "1", MEM: "0"}))).warnings == ()


def test_a_resource_in_limits_alone_is_found_there() -> None:
    raw = pod({"name": "main", "resources": {"limits": {GPU: "2", MEM: "10"}, "requests": {"cpu": "1"}}})
    resources = made(raw)["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {SHARE: "2"}, "requests": {"cpu": "1"}}
    raw = pod({"name": "main", "resources": {"limits": {GPU: "2", MEM: "10"}, "requests": {GPU: "2"}}})
    resources = made(raw)["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {SHARE: "2"}, "requests": {SHARE: "2"}}


def test_containers_of_one_size_share_it_and_init_containers_too() -> None:
    same = {GPU: "1", MEM: "1000"}
    after = made(pod(container("a", **same), container("b", **same), initContainers=[container("early", **same)]))
    assert [one["resources"]["limits"] for one in after["spec"]["containers"]] == [{SHARE: "1"}] * 2
    assert after["spec"]["initContainers"][0]["resources"]["requests"] == {SHARE: "1"}


@pytest.mark.parametrize(
    ("notes", "share", "expected"),
    [
        ({"gpu-fraction": "0.5"}, "1", {"tessera.dev/gpu-milli": "500"}),
        ({"gpu-fraction": "0.3333"}, "1", {"tessera.dev/gpu-milli": "334"}),
        ({"gpu-fraction": "1"}, "1", {"tessera.dev/gpu-milli": "1000"}),
        ({"gpu-fraction": "0.5", "gpu-fraction-num-devices": "2"}, "2", {"tessera.dev/gpu-milli": "500"}),
        ({"gpu-memory": "4096", "team": "a"}, "1", {"tessera.dev/gpu-memory": "4096Mi", "team": "a"}),
    ],
)
def test_kai_annotations_become_a_share_of_the_first_container(notes: Json, share: str, expected: Json) -> None:
    after = made(pod({"name": "main"}, container("other", cpu="1"), initContainers=[container("early")], notes=notes))
    assert held(after)
    assert after["metadata"]["annotations"] == expected
    changed = {SHARE: share}
    assert after["spec"]["containers"][0]["resources"] == {"limits": changed, "requests": changed}
    assert after["spec"]["containers"][1] == container("other", cpu="1")
    assert after["spec"]["initContainers"] == [container("early")]


def test_kai_may_name_the_container() -> None:
    notes = {"gpu-fraction": "0.5", "gpu-fraction-container-name": "b"}
    after = made(pod(container("a"), container("b", cpu="1"), notes=notes))
    assert [one["resources"]["limits"] for one in after["spec"]["containers"]] == [{}, {"cpu": "1", SHARE: "1"}]


def test_a_translation_is_told_to_the_user() -> None:
    (said,) = admit(pod(notes={"gpu-fraction": "0.5"})).warnings
    assert "gpu-fraction" in said
    assert "500 thousandths" in said
    (said,) = admit(pod(container(**{GPU: "1", MEM: "300"}))).warnings
    assert "300Mi of memory" in said
    assert admit(pod(container(**{GPU: "1"}))).warnings == ()


def test_a_misspelt_wish_is_told_to_the_user_too() -> None:
    (said,) = admit(pod(container(**{GPU: "1"}), notes={"tessera.dev/gpu-modle": "H100"})).warnings
    assert "did you mean tessera.dev/gpu-model?" in said


BAD = [
    ("request.contradiction", pod(container(**{GPU: "1", MEM: "1", PERCENT: "1"}))),
    ("request.contradiction", pod(container("a", **{GPU: "1", MEM: "1"}), container("b", **{GPU: "1", MEM: "2"}))),
    ("request.contradiction", pod(container("a", **{GPU: "1", MEM: "1"}), container("b", **{GPU: "1", CORES: "2"}))),
    ("request.contradiction", pod(container(**{SHARE: "1", MEM: "1"}))),
    ("request.contradiction", pod(container(**{GPU: "1", MEM: "1"}), notes={"tessera.dev/gpu-memory": "2Mi"})),
    ("request.contradiction", pod(notes={"gpu-fraction": "0.5", "gpu-memory": "100"})),
    ("request.contradiction", pod(container(**{GPU: "1"}), notes={"gpu-fraction": "0.5"})),
    ("request.contradiction", pod(container(**{MEM: "1"}), notes={"gpu-fraction": "0.5"})),
    ("request.contradiction", pod(notes={"gpu-fraction": "0.5", "tessera.dev/gpu-milli": "400"})),
    ("request.mixed_devices", pod(container("a", **{GPU: "1", MEM: "1"}), container("b", **{GPU: "1"}))),
    ("request.mixed_devices", pod(container(**{GPU: "1", "nvidia.com/mig-1g.10gb": "1"}))),
    ("request.share_size", pod(container(**{GPU: "1", PERCENT: "101"}))),
    ("request.share_size", pod(container(**{GPU: "1", CORES: "200"}))),
    ("request.share_size", pod(container(**{GPU: "1", MEM: str(2**31)}))),
    ("request.share_size", pod(notes={"gpu-fraction": "1.01"})),
    ("request.share_size", pod(notes={"gpu-fraction": "0"})),
    ("request.share_size", pod(notes={"gpu-fraction": "half"})),
    ("request.share_size", pod(notes={"gpu-memory": "10Gi"})),
    ("request.share_size", pod(notes={"gpu-memory": "0"})),
    ("request.share_size", pod(notes={"gpu-memory": "1", "gpu-fraction-num-devices": "0"})),
    ("request.share_size", pod(notes={"gpu-memory": "1", "gpu-fraction-num-devices": "65"})),
    ("request.share_size", pod(notes={"gpu-memory": "1", "gpu-fraction-container-name": "nobody"})),
    ("request.share_without_size", pod(container(**{SHARE: "1"}))),
    ("request.size_without_share", pod(container(**{GPU: "1"}), notes={"tessera.dev/gpu-milli": "5"})),
    ("request.size_without_share", pod(container(**{GPU: "0", MEM: "5"}))),
    ("request.profile", pod(container(**{"nvidia.com/mig-huge": "1"}))),
    ("request.negative", pod(container(**{GPU: "1", MEM: "-1"}))),
    ("request.fractional", pod(container(**{GPU: "1500m"}))),
    ("request.queue", pod(container(**{GPU: "1"}), labels={"tessera.dev/queue": "A B"})),
    ("request.model", pod(container(**{GPU: "1"}), notes={"tessera.dev/gpu-model": ","})),
    ("request.malformed", pod(container(**{GPU: "1"}), labels=["x"])),  # type: ignore[arg-type]
    ("request.malformed", pod(container(**{GPU: "1", MEM: "1"}), notes={"x": 1})),
    ("request.malformed", pod(container(**{GPU: "1"}), schedulingGates=[3])),
    (
        "request.limits_differ",
        pod({"name": "m", "resources": {"limits": {GPU: "2", MEM: "1"}, "requests": {GPU: "1", MEM: "1"}}}),
    ),
]


@pytest.mark.parametrize(("code", "raw"), BAD, ids=[f"{code}-{number}" for number, (code, _) in enumerate(BAD)])
def test_bad_asks_are_refused_with_a_code_and_a_sentence(code: str, raw: Json) -> None:
    assert refused(raw).code == code


def review(raw: Json | None = None, **request: object) -> bytes:
    asked: Json = {
        "uid": "u-1",
        "operation": "CREATE",
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "userInfo": {"username": "ada", "groups": ["system:authenticated"]},
        "object": pod(container(**{GPU: "1"})) if raw is None else raw,
    }
    return orjson.dumps(
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {**asked, **request}}
    )


def test_a_review_of_a_new_pod_is_read() -> None:
    assert read_review(review()).pod == pod(container(**{GPU: "1"}))


@pytest.mark.parametrize(
    "request_",
    [
        {"operation": "UPDATE"},
        {"operation": "DELETE", "object": None},
        {"subResource": "ephemeralcontainers"},
        {"subResource": "binding"},
        {"resource": {"group": "apps", "resource": "deployments"}},
        {"resource": {"group": "metrics.k8s.io", "resource": "pods"}},
        {"userInfo": {"groups": ["system:nodes", "system:authenticated"]}},
    ],
)
def test_other_questions_are_none_of_ours(request_: Json) -> None:
    assert read_review(review(**request_)).pod is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"\xff",
        b"[" * 2000,
        review(uid=7),
        review(uid=""),
        review(uid="x" * 254),
        review(object=None),
        review(object=[]),
        review(resource=3),
        review(userInfo=3),
        review(userInfo={"groups": "x"}),
        review().replace(b"admission.k8s.io/v1", b"admission.k8s.io/v1beta1"),
        orjson.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": []}),
    ],
)
def test_what_is_no_review_is_said_so(body: bytes) -> None:
    with pytest.raises(BadReview, match=r"; (send|list|write)|must be"):
        read_review(body)


def nested(depth: int) -> Json:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return pod(container(), x=tree)


def test_depth_is_bounded_exactly() -> None:
    around = 4  # body, request, object, spec
    assert read_review(review(nested(64 - around))).pod is not None
    with pytest.raises(BadReview, match="deeper than 64"):
        read_review(review(nested(65 - around)))


def test_the_answer_is_what_the_api_server_reads() -> None:
    admission = admit(pod(container(**{GPU: "1", MEM: "1"})))
    said = orjson.loads(answer("u-1", admission))
    assert (said["apiVersion"], said["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response = said["response"]
    assert (response["uid"], response["allowed"], response["patchType"]) == ("u-1", True, "JSONPatch")
    assert orjson.loads(base64.b64decode(response["patch"])) == [dict(one) for one in admission.patch]
    assert response["warnings"] == list(admission.warnings)


def test_an_untouched_pod_gets_no_patch_and_a_bad_one_a_sentence() -> None:
    assert orjson.loads(answer("u", UNTOUCHED))["response"] == {"uid": "u", "allowed": True}
    response = orjson.loads(answer("u", admit(pod(container(**{SHARE: "1"})))))["response"]
    assert response["allowed"] is False
    assert response["status"]["code"] == 422
    assert response["status"]["message"].startswith("request.share_without_size: tessera.dev/share needs a size")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.sampled_from(["", "1", "-1", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([GPU, MEM, "name"]), inner, max_size=3),
    max_leaves=8,
)
RESOURCES = st.fixed_dictionaries({"limits": JSON})
CONTAINERS = st.lists(st.fixed_dictionaries({"name": JSON, "resources": RESOURCES}), max_size=3)
NOTES = JSON | st.just({"gpu-fraction": "0.5"})
META = st.fixed_dictionaries({"annotations": NOTES, "labels": JSON})
SPEC = st.fixed_dictionaries(
    {"containers": JSON | CONTAINERS, "schedulerName": JSON | st.just("tessera"), "schedulingGates": JSON}
)


@given(st.fixed_dictionaries({}, optional={"metadata": JSON | META, "spec": JSON | SPEC}))
def test_any_json_gets_an_answer(raw: Json) -> None:
    admission = admit(raw)
    assert orjson.loads(answer("u", admission))["response"]["allowed"] is (admission.refusal is None)
    if admission.patch:
        after = patched(raw, [dict(one) for one in admission.patch], "json")
        assert admit(after) == Admission()
        assert read_pod(after).request.refusal is None
