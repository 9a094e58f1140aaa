"""The configuration: every mistake is named with its line, and nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.columns import Mode
from scheduler.config import Settings, load
from scheduler.errors import ConfigError
from scheduler.intake.node import read_node

GROUP = """\
- name: h100
  labels: {pool: h100, nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3, tessera.dev/mode: exact}
  taints: [{key: nvidia.com/gpu, effect: NoSchedule}]
  capacity: {cpu: 64, memory: 512Gi, ephemeral-storage: 1Ti, nvidia.com/gpu: 8}
  maxNodes: 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tessera.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert settings.extender.k == 1
    assert settings.extender.filterDeadline == 0.8
    assert settings.policy.policies().masks


def test_durations_and_nesting(tmp_path: Path) -> None:
    settings = load(write(tmp_path, "extender: {k: 4, bindDeadline: 900ms}\nqueue:\n  halfLife: 1d12h\n"), {})
    assert settings.extender.k == 4
    assert settings.extender.bindDeadline == pytest.approx(0.9)
    assert settings.queue.halfLife == 36 * 3600


def test_the_environment_beats_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "extender: {k: 4}\n")
    settings = load(path, {"TESSERA_EXTENDER_K": "7", "TESSERA_LOG_LEVEL": "debug", "TESSERA_PRICES": "{H100: 2}"})
    assert settings.extender.k == 7
    assert settings.log.level == "debug"
    assert settings.without_effect() == ["prices"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("extender:\n  k: 1\n  kay: 2\n", (":3:", "unknown key `extender.kay`", "bindDeadline")),
        ("\nextendr: {}\n", (":2:", "unknown key `extendr`", "policy")),
        ("extender:\n  k: 0\n", (":2:", "`extender.k`", "greater than or equal to 1")),
        ("queue:\n  halfLife: soon\n", (":2:", "not a duration", "1.5s")),
        ("policy:\n  masks: [nothing]\n", (":1:", "no mask 'nothing'", "legal names")),
        ("policy:\n  tiers:\n  - {magic: 1}\n", (":1:", "no score 'magic'", "legal names")),
        (
            "nodeGroups:\n- name: a\n  capacity: {cpu: 8, memory: 1Gi}\n  minNodes: 1\n",
            (":4:", "unknown key `nodeGroups.0.minNodes`", "maxNodes"),
        ),
        (
            "nodeGroups:\n- name: a\n  capacity: {cpu: 8, memory: 1Gi}\n  taints:\n  - {key: a, sort: NoSchedule}\n",
            (":5:", "`nodeGroups.0.taints.0.sort`", "allowed here: key, value, effect"),
        ),
        ("nodeGroups:\n- name: a\n  capacity: {cpu: 8}\n", (":2:", "lacks memory")),
        ("nodeGroups:\n- name: a\n  capacity: {cpu: much, memory: 1Gi}\n", (":2:", "allocatable", "cpu")),
        (f"nodeGroups:\n{GROUP}{GROUP}", (":1:", "two groups are called 'h100'")),
        ("nodeGroups:\n- name: a\n  labels: {count: 8}\n  capacity: {cpu: 8, memory: 1Gi}\n", (":3:", "valid string")),
        ("nodeGroups: {a: 1}\n", (":1:", "`nodeGroups`")),
        ("- a\n", ("mapping",)),
        ("a: [\n", ("not YAML",)),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text), {})
    for part in parts:
        assert part in str(error.value)
    assert "Value error" not in str(error.value)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml", {})


def test_a_variable_that_is_not_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match="TESSERA_POLICY_TIERS"):
        load(None, {"TESSERA_POLICY_TIERS": "[["})
    with pytest.raises(ConfigError, match="TESSERA_PRICES"):
        load(None, {"TESSERA_PRICES": "{"})


def test_every_key_that_has_no_effect_yet_is_named(tmp_path: Path) -> None:
    text = "queue: {turnSlice: 10ms, reservationTimeout: 60s, halfLife: 1h}\nprices: {H100: 2}\n"
    assert load(write(tmp_path, text), {}).without_effect() == ["prices"]


def test_the_extenders_clients_are_named_and_never_nobody(tmp_path: Path) -> None:
    assert load(None, {}).extender.clientNames == ("kube-scheduler.tessera",)
    named = load(None, {"TESSERA_EXTENDER_CLIENTNAMES": "[a.example, spiffe://b]"})
    assert named.extender.clientNames == ("a.example", "spiffe://b")
    path = tmp_path / "config.yaml"
    for nobody in ("[]", "['']", "''"):
        path.write_text(f"extender:\n  clientNames: {nobody}\n")
        with pytest.raises(ConfigError, match=r":2: `extender\.clientNames"):
            load(path, {})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("TESSERA_EXTENDER_FILTERDEADLIN", "TESSERA_EXTENDER_FILTERDEADLINE"),
        ("TESSERA_EXTENDER_FILTER_DEADLINE", "TESSERA_EXTENDER_FILTERDEADLINE"),
        ("TESSERA_NAMESPACES", "TESSERA_NAMESPACE"),
        ("TESSERA_STATES", "TESSERA_STATE"),
        ("tessera_log_level", "TESSERA_LOG_LEVEL"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no variable {name}; did you mean {near}[?]"):
        load(None, {name: "1"})


@pytest.mark.parametrize(
    "name",
    [
        *("TESSERA_STATE", "TESSERA_TRACES", "TESSERA_KUBE_BIN", "TESSERA_FAULT", "PATH"),
        *("TESSERA_SERVICE_HOST", "TESSERA_SERVICE_PORT", "TESSERA_SERVICE_PORT_HTTPS", "TESSERA_PORT"),
        *("TESSERA_METRICS_PORT_9090_TCP", "TESSERA_PORT_443_TCP_ADDR", "TESSERA_PORT_53_UDP_PROTO"),
    ],
)
def test_variables_of_others_are_left_alone(name: str) -> None:
    """A kubelet sets variables for each Service of the namespace, one of which may be called tessera."""
    assert load(None, {name: "tcp://10.0.0.1:443"}) == Settings()


def test_every_setting_of_the_top_has_a_variable() -> None:
    assert load(None, {"TESSERA_NAMESPACE": "gpu"}).namespace == "gpu"
    assert load(None, {"TESSERA_NODEGROUPS": GROUP}).nodeGroups[0].maxNodes == 4


@pytest.mark.parametrize("key", ["filterDeadline", "bindDeadline"])
def test_a_deadline_beyond_kube_schedulers_patience_is_refused(key: str, tmp_path: Path) -> None:
    assert getattr(load(write(tmp_path, f"extender: {{{key}: 2s}}\n"), {}).extender, key) == 2.0
    with pytest.raises(ConfigError, match=f"(?s):1: `extender.{key}`: .*at most 2 s: kube-scheduler's httpTimeout"):
        load(write(tmp_path, f"extender: {{{key}: 2001ms}}\n"), {})


def test_a_node_group_is_read_as_a_node_is(tmp_path: Path) -> None:
    settings = load(write(tmp_path, f"nodeGroups:\n{GROUP}queue: {{autoscaleTimeout: 10m}}\n"), {})
    node = read_node(settings.nodeGroups[0].node(), {"NVIDIA-H100-80GB-HBM3": "H100-80"})
    assert node is not None
    assert (node.gpus, node.mode, node.pods, node.amounts.cpu_milli) == (8, Mode.EXACT, 110, 64_000)
    assert {device.model for device in node.devices} == {"H100-80"}
    assert [(taint.key, taint.effect) for taint in node.taints] == [("nvidia.com/gpu", "NoSchedule")]
    assert settings.queue.autoscaleTimeout == 600.0
    assert settings.without_effect() == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("access: {oidc: [{issuer: a, audience: b, keys: http://elsewhere/keys}]}", "access.oidc.0.keys"),
        (
            "access: {oidc: [{issuer: a, audience: b, keys: https://a/k, algorithms: [HS256]}]}",
            "access.oidc.0.algorithms",
        ),
        ("access: {oidc: [{issuer: a, audience: b, keys: https://a/k, leeway: 2m}]}", "access.oidc.0.leeway"),
        ("access: {oidc: [{issuer: a, audience: b, keys: https://a/k, name: kubernetes}]}", "others' people"),
        (
            "access: {oidc: [{issuer: a, audience: b, keys: https://a/k}, {issuer: c, audience: b, keys: https://a/k}]}",
            "two providers have one name",
        ),
        ("access: {bindings: [{role: root}]}", "access.bindings.0.role"),
        ("access: {bindings: [{role: admin}]}", "nobody has this role"),
        ("access: {bindings: [{role: admin, users: [alice]}]}", "'alice' is nobody"),
        ("access: {bindings: [{role: admin, groups: ['oidc:']}]}", "'oidc:' is nobody"),
        ("access: {bindings: [{role: admin, users: ['token:ci']}]}", "a token has its role"),
        ("access: {bindings: [{role: user, users: ['oidc:a'], queues: [q]}]}", "without namespaces"),
        ("access: {bindings: [{role: viewer, groups: ['oidc:a']}]}", "without namespaces or queues"),
        ("access: {burst: 0}", "access.burst"),
        ("access: {password: x}", "unknown key `access.password`"),
    ],
)
def test_access_that_would_be_unsafe_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(write(tmp_path, text), {})


def test_access_is_configured_by_any_way_of_knowing_people(tmp_path: Path) -> None:
    assert not load(write(tmp_path, "access: {bindings: [{role: admin, users: ['oidc:a']}]}"), {}).access.configured
    for text in ("tokens: /a", "kubernetes: {}", "oidc: [{issuer: a, audience: b, keys: 'https://a/k'}]"):
        assert load(write(tmp_path, f"access: {{{text}}}"), {}).access.configured
