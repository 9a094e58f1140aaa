"""A pod as Tessera sees it, and the Request in it: what it asks, who it belongs to, where it may run.

Invariant: amounts are whole numbers, never negative and at most `AMOUNT_MAX`; whatever in a pod cannot be read so
becomes a Refusal, never an exception and never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.columns import Kind

from .allocation import Allocation

AMOUNT_MAX = 1 << 62  # bytes; device amounts are bounded far lower, at 2^40


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a pod can never be placed as it is written.

    Attributes:
        reason: CamelCase word of the reason vocabulary, such as `InvalidRequest`.
        code: stable dotted code, such as `request.share_without_size`.
        text: one sentence that says what to change.
    """

    reason: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a pod takes from its node beside devices."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    storage_bytes: int = 0  # ephemeral-storage
    extended: tuple[tuple[str, int], ...] = ()  # other extended resources and hugepages, sorted by name


@dataclass(frozen=True, slots=True)
class ContainerAsk:
    """How many devices one container asks; role is `app`, `sidecar` (restartable init) or `init`."""

    name: str
    role: str
    count: int


@dataclass(frozen=True, slots=True)
class DeviceAsk:
    """What a pod asks of devices.

    Attributes:
        kind: whole GPUs, MIG slices, shares or nothing.
        count: devices of the whole pod after the reuse by init containers; 0 for Kind.NONE.
        resource: the resource name as the pod spells it; empty for Kind.NONE.
        profile: MIG profile name with "+", such as `1g.10gb+me`; empty otherwise.
        memory_mib, milli: size of one share; 0 = not given.
        models: entries of gpu-model, lower case, in the user's order; empty = any.
        containers: those that ask, init containers first, in declaration order.
        init_only: no app or sidecar container asks, only ordinary init containers.
    """

    kind: Kind = Kind.NONE
    count: int = 0
    resource: str = ""
    profile: str = ""
    memory_mib: int = 0
    milli: int = 0
    models: tuple[str, ...] = ()
    containers: tuple[ContainerAsk, ...] = ()
    init_only: bool = False


@dataclass(frozen=True, slots=True)
class Expression:
    """One requirement on labels or fields: operator is In, NotIn, Exists, DoesNotExist, Gt or Lt."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """One nodeSelectorTerm; all its expressions must hold, and a term without any matches nothing."""

    labels: tuple[Expression, ...] = ()
    fields: tuple[Expression, ...] = ()


@dataclass(frozen=True, slots=True)
class Toleration:
    """A pod's toleration; empty strings mean the field is absent."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """Where a pod may run: hashable, so that the answer over all nodes can be kept per distinct Selection.

    `terms` is None when there is no required node affinity; an empty tuple matches no node.
    """

    labels: tuple[tuple[str, str], ...] = ()
    terms: tuple[Term, ...] | None = None
    tolerations: tuple[Toleration, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What one pod wants. Its id is the pod's UID; the workload is its controller, or itself."""

    id: str
    namespace: str
    name: str
    workload: str
    arrival_us: int
    priority: int = 0
    queue: str = "default"
    gang: str = ""
    gang_size: int = 0
    workload_class: str = ""  # annotation class: batch, serving or empty
    max_runtime_s: int = 0  # 0 = not declared
    claims: bool = False  # asks through ResourceClaims, which Tessera does not judge
    amounts: Amounts = Amounts()
    devices: DeviceAsk = DeviceAsk()
    selection: Selection = Selection()
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod, ours or anybody's, reduced to what the inventory, the ledger and the extender need."""

    request: Request
    resource_version: str
    ours: bool  # schedulerName is tessera
    node: str = ""  # spec.nodeName
    phase: str = "Pending"
    terminal: bool = False  # Succeeded or Failed: holds nothing any more
    deleting: bool = False  # has a deletionTimestamp; still holds what it has
    gates: tuple[str, ...] = ()
    nominated: str = ""
    unschedulable: bool = False  # condition PodScheduled is False with reason Unschedulable: kube-scheduler parked it
    asked_us: int = 0  # since when a new node is asked for it; 0 = none is
    touch: int = 0  # epoch up to which bindings in flight are void
    tokens: tuple[tuple[str, int], ...] = ()  # device resources asked, sorted, as the node must book them
    allocation: Allocation | None = None  # as written by the Binding; None where absent or unreadable
    warnings: tuple[str, ...] = ()  # labels and annotations with our prefix that have no effect, a sentence each
    owner: str = ""  # kind of its controller, such as Job or ReplicaSet

    @property
    def uid(self) -> str:
        """The pod's UID."""
        return self.request.id
