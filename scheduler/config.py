"""The configuration file and its environment variables: one tree of settings, read once at start.

Invariant: an unknown key or a bad value stops the start with the file, the line and what is allowed; nothing is
ignored silently. `TESSERA_EXTENDER_K=4` sets `extender.k`; the environment beats the file.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from scheduler import faults
from scheduler.decision.catalog import DEFAULT_MASKS, DEFAULT_TIERS, Policies, read_policies
from scheduler.errors import ConfigError
from scheduler.intake.node import read_node
from scheduler.model.subject import Role

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(value: object) -> object:
    """Read a duration such as `800ms`, `1.5s`, `2m` or `24h`; plain numbers are seconds."""
    if not isinstance(value, str):
        return value
    parts = _DURATION.findall(value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        raise ValueError(f"{value!r} is not a duration; write it like 800ms, 1.5s, 2m or 24h")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0, le=366 * 86400)]


HTTP_TIMEOUT_S = 2.0
"""How long kube-scheduler waits for an answer (`httpTimeout` in deploy/), whatever it asks."""
ELSEWHERE = frozenset({"TESSERA_STATE", "TESSERA_TRACES", "TESSERA_KUBE_BIN", "TESSERA_TOKEN", faults.VARIABLE})
"""Variables that are no configuration: state folder, the token of commands, and what benches and tests read or set."""
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""What a kubelet sets in every pod beside a Service whose name begins with `tessera`, such as TESSERA_SERVICE_HOST."""


def below_http_timeout(deadline_s: float) -> float:
    """Return a deadline for an answer to kube-scheduler, in seconds. Raises ValueError when nobody waits that long."""
    if deadline_s > HTTP_TIMEOUT_S:
        raise ValueError(f"at most {HTTP_TIMEOUT_S:.0f} s: kube-scheduler's httpTimeout has given up by then")
    return deadline_s


Deadline = Annotated[Duration, AfterValidator(below_http_timeout)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Extender(_Part):
    """How kube-scheduler is answered: K nodes, and deadlines below its httpTimeout of 2 s.

    Over TLS, `clientNames` are the DNS names or URIs, one of which its certificate must carry.
    """

    k: int = Field(default=1, ge=1, le=1000)
    filterDeadline: Deadline = 0.8  # noqa: N815 - the file's spelling
    bindDeadline: Deadline = 1.5  # noqa: N815
    clientNames: tuple[Annotated[str, Field(min_length=1, max_length=253)], ...] = Field(  # noqa: N815
        default=("kube-scheduler.tessera",), min_length=1, max_length=64
    )


class Policy(_Part):
    """Which masks and scores decide, by catalogue name; weights count only inside their tier."""

    masks: tuple[str, ...] = DEFAULT_MASKS
    tiers: tuple[dict[str, float] | tuple[str, ...], ...] = tuple(dict(tier) for tier in DEFAULT_TIERS)

    @model_validator(mode="after")
    def _known(self) -> Policy:
        self.policies()
        return self

    def policies(self) -> Policies:
        """Return the checked policies."""
        return read_policies(self.masks, self.tiers)


class Queue(_Part):
    """How the queue turns: in slices of so long, with so many pods let go and not bound yet at most.

    For a pod that waits for a new node, a node is asked for no longer than `autoscaleTimeout`.
    """

    turnSlice: Duration = 0.02  # noqa: N815
    reservationTimeout: Duration = 120.0  # noqa: N815
    releaseWindow: int = Field(default=256, ge=1, le=10_000)  # noqa: N815
    halfLife: Duration = 86400.0  # noqa: N815
    autoscaleTimeout: Duration = 900.0  # noqa: N815


class Taint(_Part):
    """A taint that new nodes of a group bear for as long as they live."""

    key: str = Field(min_length=1, max_length=317)
    value: str = Field(default="", max_length=63)
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class NodeGroup(_Part):
    """What a new node of a group that an autoscaler grows looks like, and how many there may be; None = any number.

    `capacity` is what pods can have there, as the status of a node writes it.
    """

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    labels: dict[str, str] = Field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    capacity: dict[str, str | int | float]
    maxNodes: int | None = Field(default=None, ge=1, le=100_000)  # noqa: N815

    def node(self) -> dict[str, Any]:
        """Return the group's next node as the API server would show it."""
        return {
            "metadata": {"name": self.name, "uid": self.name, "labels": dict(self.labels)},
            "spec": {"taints": [taint.model_dump() for taint in self.taints]},
            "status": {"allocatable": {"pods": "110", **self.capacity}},
        }

    @model_validator(mode="after")
    def _readable(self) -> NodeGroup:
        if missing := [resource for resource in ("cpu", "memory") if resource not in self.capacity]:
            raise ValueError(f"capacity lacks {missing[0]}: without it no pod fits")
        read = read_node(self.node(), {})
        if read is not None and read.warnings:
            raise ValueError(read.warnings[0])
        return self


class Kubernetes(_Part):
    """People whom the API server vouches for; `audiences` are those their tokens must be made for, none = its own."""

    audiences: tuple[str, ...] = ()


class Oidc(_Part):
    """An OpenID Connect provider whose access tokens are taken; `keys` is the URL of its JWKS.

    `user` and `groups` are the names of claims; people are then called NAME:USER and NAME:GROUP.
    """

    name: str = Field(default="oidc", pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")
    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    keys: str = Field(pattern=r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])")
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"], ...] = (
        Field(default=("RS256", "ES256"), min_length=1)
    )
    user: str = "sub"
    groups: str = "groups"
    leeway: Annotated[Duration, Field(le=60)] = 30.0


class Bound(_Part):
    """A role, of whom, and in which namespaces and queues."""

    role: Role
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _of_somebody(self) -> Bound:
        if not self.users and not self.groups:
            raise ValueError("name users or groups: nobody has this role by it")
        for one in (*self.users, *self.groups):
            source, _, called = one.partition(":")
            if not source or not called or source == "token":
                raise ValueError(
                    f"{one!r} is nobody: people are kubernetes:NAME or PROVIDER:NAME; a token has its role"
                )
        if self.role in {Role.USER, Role.SERVICE} and not self.namespaces:
            raise ValueError(f"role {self.role.value} reaches nothing without namespaces")
        if self.role is Role.VIEWER and not (self.namespaces or self.queues):
            raise ValueError("role viewer reaches nothing without namespaces or queues")
        return self


class Access(_Part):
    """Who may use the API, and how they are known. With none of it the API listens on loopback alone, for everybody.

    `tokens` is the file that `tessera token` writes.
    """

    tokens: Path | None = None
    kubernetes: Kubernetes | None = None
    oidc: tuple[Oidc, ...] = Field(default=(), max_length=16)
    bindings: tuple[Bound, ...] = Field(default=(), max_length=10_000)
    callsPerSecond: float = Field(default=50.0, gt=0, le=100_000)  # noqa: N815
    burst: float = Field(default=200.0, ge=1, le=1_000_000)

    @field_validator("oidc")
    @classmethod
    def _told_apart(cls, providers: tuple[Oidc, ...]) -> tuple[Oidc, ...]:
        for what in ("name", "issuer"):
            if len({getattr(one, what) for one in providers}) < len(providers):
                raise ValueError(f"two providers have one {what}; their people could not be told apart")
        if any(one.name in {"kubernetes", "token"} for one in providers):
            raise ValueError("a provider is not called kubernetes or token: those are others' people")
        return providers

    @property
    def configured(self) -> bool:
        """Say whether people are asked who they are."""
        return self.tokens is not None or self.kubernetes is not None or bool(self.oidc)


class Log(_Part):
    """What is logged, and whether for people (`console`) or machines (`json`); `auto` asks the terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Settings(_Part):
    """The whole tree. Keys that have no effect yet are read, kept and named in a warning at start."""

    extender: Extender = Extender()
    policy: Policy = Policy()
    queue: Queue = Queue()
    log: Log = Log()
    namespace: str = Field(default="tessera-system", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    agentNamespace: str = Field(default="tessera-agent", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")  # noqa: N815
    nodeGroups: tuple[NodeGroup, ...] = Field(default=(), max_length=256)  # noqa: N815
    templates: dict[str, Any] = Field(default_factory=dict)
    access: Access = Access()
    notify: dict[str, Any] = Field(default_factory=dict)
    prices: dict[str, Any] = Field(default_factory=dict)

    @field_validator("nodeGroups")
    @classmethod
    def _told_apart(cls, groups: tuple[NodeGroup, ...]) -> tuple[NodeGroup, ...]:
        if twice := [name for name, count in Counter(group.name for group in groups).items() if count > 1]:
            raise ValueError(f"two groups are called {twice[0]!r}; give each a name of its own")
        return groups

    def without_effect(self) -> list[str]:
        """Return the keys that were given and do nothing in this version."""
        return [key for key in ("templates", "notify", "prices") if getattr(self, key)]


def load(path: Path | None, environment: Mapping[str, str]) -> Settings:
    """Read the file (None = defaults) and the environment.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not allowed; the sentence names file and line.
    """
    text, where = "", "environment"
    if path is not None:
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: the top must be a mapping with keys such as `extender:` and `policy:`")
    _from_environment(tree, environment)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(where, text, problem) for problem in error.errors())) from error


def _from_environment(tree: dict[str, Any], environment: Mapping[str, str]) -> None:
    parts = (("extender", Extender), ("policy", Policy), ("queue", Queue), ("log", Log))
    known = {f"TESSERA_{section}_{key}".upper(): (section, key) for section, kind in parts for key in kind.model_fields}
    known |= {f"TESSERA_{key}".upper(): ("", key) for key in Settings.model_fields.keys() - dict(parts).keys()}
    _refuse_unknown(environment, known.keys() | ELSEWHERE)
    for name, (section, key) in known.items():
        if name in environment:
            part = tree.setdefault(section, {}) if section else tree
            if isinstance(part, dict):
                part[key] = _variable(name, environment)


def _refuse_unknown(environment: Mapping[str, str], known: Collection[str]) -> None:
    """Raise ConfigError for a variable that looks like ours and is none, so that a slip of the pen is not ignored."""
    for name in sorted(environment):
        if name.upper().startswith("TESSERA_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            near = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.0)[0]
            raise ConfigError(f"environment: Tessera knows no variable {name}; did you mean {near}? Else unset it")


def _variable(name: str, environment: Mapping[str, str]) -> object:
    try:
        return yaml.safe_load(environment[name])
    except yaml.YAMLError as error:
        raise ConfigError(f"environment variable {name} is not YAML: {error}") from error


def _sentence(where: str, text: str, problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    line = _line(text, path)
    place = f"{where}:{line}" if line else where
    if problem["type"] == "extra_forbidden":
        part: type[BaseModel] = Settings
        for name in path[:-1]:
            inner: Any = part.model_fields[name].annotation if name in part.model_fields else None
            inner = next(iter(get_args(inner)), inner)  # of a list: what is in it
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                part = inner
        return f"{place}: unknown key `{'.'.join(path)}`; allowed here: {', '.join(part.model_fields)}"
    return f"{place}: `{'.'.join(path)}`: {problem['msg'].removeprefix('Value error, ')}"


def _line(text: str, path: list[str]) -> int:
    """Return the 1-based line of a key path in the YAML text, 0 when it is not in the file."""
    node, line = yaml.compose(text) if text else None, 0
    for name in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == name), None)
            if found is None:
                return 0
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and name.isdigit() and int(name) < len(node.value):
            node = node.value[int(name)]
            line = node.start_mark.line + 1
    return line
