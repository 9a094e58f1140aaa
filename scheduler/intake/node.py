"""Node objects to the model. Never raises: what cannot be read is a warning, and counts as not there.

Labels read beside Kubernetes' own: `tessera.dev/mode`, `tessera.dev/mig-devices`, those of GPU Feature Discovery, the
zone from `topology.kubernetes.io/zone` and the rack from `tessera.dev/rack`, else from `topology.kubernetes.io/rack`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from policies.columns import Mode
from scheduler import GPU, PREFIX, SHARE
from scheduler.model.node import Device, Node, Taint
from scheduler.model.pod import Amounts

from .demand import DEVICE_MAX
from .devices import MEMORY_MAX_MIB
from .gpu_model import plain_product
from .quantity import QuantityError, milli, whole
from .reading import NAME_MAX, shown
from .resources import DEVICES_MAX, is_device, profile_of

MODE = PREFIX + "mode"
MIG_DEVICES = PREFIX + "mig-devices"
ZONE = "topology.kubernetes.io/zone"
RACKS = (PREFIX + "rack", "topology.kubernetes.io/rack")
PRODUCT, COUNT, MEMORY, REPLICAS = (f"nvidia.com/gpu.{word}" for word in ("product", "count", "memory", "replicas"))
STRATEGY = "nvidia.com/mig.strategy"
PODS_MAX = 16_384
LISTED_MAX = 1024  # labels, taints and resources of one node
_DIGITS = re.compile(r"[0-9]{1,10}")
_SPANS = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?([,._][0-9]{1,4}(-[0-9]{1,4})?)*")


def read_node(raw: Mapping[str, object], products: Mapping[str, str]) -> Node | None:
    """Return a node as its Node object describes it, or None where it has no name or no uid.

    Args:
        raw: the Node object; any JSON is accepted.
        products: product label -> key of the geometry table; other products are models of their own name.
    """
    warnings: list[str] = []
    raw = _object(raw, "the node", warnings)
    meta, spec, status = (_object(raw.get(key), key, warnings) for key in ("metadata", "spec", "status"))
    name, uid, version = (_text(meta.get(key), warnings) for key in ("name", "uid", "resourceVersion"))
    if not name or not uid:
        return None
    labels = _labels(meta, warnings)
    there = _listed(status, "allocatable", warnings)
    mode = _mode(labels, warnings)
    gpus = there.get(GPU, 0)
    devices = _devices(mode, labels, gpus, products, warnings)
    return Node(
        uid=uid,
        name=name,
        resource_version=version,
        mode=mode,
        amounts=_amounts(there),
        pods=min(there.get("pods", 0), PODS_MAX),
        gpus=gpus,
        slices=_slices(there, warnings),
        shares=there.get(SHARE, 0),
        whole_gpus=mode is Mode.EXACT or not _divided(labels, warnings),
        product=labels.get(PRODUCT, ""),
        devices=devices,
        labels=tuple(sorted(labels.items())),
        taints=_taints(spec, warnings),
        unschedulable=spec.get("unschedulable") is True,
        ready=_ready(status),
        zone=labels.get(ZONE, ""),
        rack=next((labels[key] for key in RACKS if labels.get(key)), ""),
        gpus_most=len(devices) if mode is Mode.EXACT else max(len(devices), _parts(_listed(status, "capacity", []))),
        warnings=tuple(warnings),
    )


def _object(value: object, where: str, warnings: list[str]) -> Mapping[str, object]:
    if isinstance(value, dict):
        return value
    if value is not None:
        warnings.append(f"{where} is no object; it is read as empty.")
    return {}


def _text(value: object, warnings: list[str]) -> str:
    if isinstance(value, str) and len(value) <= NAME_MAX:
        return value
    if value is not None:
        warnings.append(f"{shown(value)} is no name; it is read as empty.")
    return ""


def _labels(meta: Mapping[str, object], warnings: list[str]) -> dict[str, str]:
    listed = _object(meta.get("labels"), "metadata.labels", warnings)
    labels = {key: value for key, value in listed.items() if isinstance(value, str)}
    if len(labels) < len(listed):
        warnings.append("a label is no text; it is left out.")
    if len(labels) > LISTED_MAX:
        warnings.append(f"only the first {LISTED_MAX} labels are read.")
    return dict(list(labels.items())[:LISTED_MAX])


def _taints(spec: Mapping[str, object], warnings: list[str]) -> tuple[Taint, ...]:
    """Return the taints; a taint that cannot be read keeps every pod away, like a cordon."""
    listed = spec.get("taints")
    if listed is None:
        return ()
    if not isinstance(listed, list) or len(listed) > LISTED_MAX:
        listed = [None]
    return tuple(_taint(raw, warnings) for raw in listed)


def _ready(status: Mapping[str, object]) -> bool:
    """Say whether the condition Ready is True; one that is absent or cannot be read is not."""
    listed = status.get("conditions")
    return isinstance(listed, list) and any(
        isinstance(one, dict) and one.get("type") == "Ready" and one.get("status") == "True" for one in listed
    )


def _taint(raw: object, warnings: list[str]) -> Taint:
    if isinstance(raw, dict):
        key, value, effect = raw.get("key"), raw.get("value"), raw.get("effect")
        if isinstance(key, str) and isinstance(value, str | None) and isinstance(effect, str):
            return Taint(key=key, value=value or "", effect=effect)
    warnings.append("a taint cannot be read; no pod is placed here.")
    return Taint(key=PREFIX + "unreadable-taint", value="", effect="NoSchedule")


def _parts(there: Mapping[str, int]) -> int:
    """Return how many GPUs and MIG instances a plugin tells of together: no machine has more GPUs than these."""
    return min(sum(count for resource, count in there.items() if is_device(resource)), DEVICES_MAX)


def _listed(status: Mapping[str, object], kind: str, warnings: list[str]) -> dict[str, int]:
    """Return whole amounts by resource, cpu in thousandths; what cannot be read is not there."""
    there: dict[str, int] = {}
    listed = _object(status.get(kind), f"status.{kind}", warnings)
    for resource, value in list(listed.items())[:LISTED_MAX]:
        try:
            amount = milli(value) if resource == "cpu" else whole(value)
        except QuantityError as error:
            warnings.append(f"{kind} {shown(resource)}: {error}")
            continue
        limit = DEVICE_MAX if is_device(resource) else amount
        if not 0 <= amount <= limit:
            warnings.append(f"{kind} {shown(resource)} is out of range; it is read as 0.")
            amount = 0
        there[resource] = amount
    return there


def _amounts(there: Mapping[str, int]) -> Amounts:
    core = ("cpu", "memory", "ephemeral-storage")
    rest = {n: count for n, count in there.items() if n not in {*core, "pods"} and not is_device(n)}
    cpu, memory, storage = (there.get(resource, 0) for resource in core)
    return Amounts(cpu_milli=cpu, memory_bytes=memory, storage_bytes=storage, extended=tuple(sorted(rest.items())))


def _slices(there: Mapping[str, int], warnings: list[str]) -> tuple[tuple[str, int], ...]:
    slices: dict[str, int] = {}
    for resource, count in there.items():
        if is_device(resource) and resource not in {GPU, SHARE}:
            profile = profile_of(resource)
            if profile:
                slices[profile] = count
            else:
                warnings.append(f"{shown(resource)} names no MIG profile; it is left out.")
    return tuple(sorted(slices.items()))


def _mode(labels: Mapping[str, str], warnings: list[str]) -> Mode:
    said = labels.get(MODE, "observed")
    if said not in {"observed", "exact"}:
        warnings.append(f"label {MODE} must be observed or exact; {shown(said)} is read as observed.")
    return Mode.EXACT if said == "exact" else Mode.OBSERVED


def _divided(labels: Mapping[str, str], warnings: list[str]) -> bool:
    """Say whether nvidia.com/gpu counts parts of GPUs on an observed node: replicas, or MIG strategy `single`.

    Under `single` GPU Feature Discovery names the slice in the product label; a product without it is undivided,
    an absent one is not known to be.
    """
    product = labels.get(PRODUCT, "")
    if product.endswith("-SHARED") or "-MIG-" in product:
        return True
    if labels.get(STRATEGY) == "single" and not product:
        return True
    return REPLICAS in labels and _number(labels, REPLICAS, DEVICE_MAX, warnings) not in {0, 1}


def _number(labels: Mapping[str, str], label: str, most: int, warnings: list[str]) -> int:
    """Return the number in a label; -1 where it is absent or unreadable."""
    written = labels.get(label)
    if written is None:
        return -1
    if _DIGITS.fullmatch(written) is None or int(written) > most:
        warnings.append(f"label {label} must be a number up to {most}; {shown(written)} is not read.")
        return -1
    return int(written)


def _devices(
    mode: Mode, labels: Mapping[str, str], gpus: int, products: Mapping[str, str], warnings: list[str]
) -> tuple[Device, ...]:
    """Return one entry per physical GPU, as the labels tell."""
    product = labels.get(PRODUCT, "")
    if "-MIG-" in product and mode is Mode.OBSERVED:
        return ()  # the labels count slices here; how many GPUs carry them is not told
    count = _number(labels, COUNT, DEVICE_MAX, warnings)
    if count < 0:
        replicas = max(1, _number(labels, REPLICAS, DEVICE_MAX, [])) if mode is Mode.OBSERVED else 1
        count = gpus // replicas
    if count > DEVICES_MAX:
        warnings.append(f"the node tells of {count} GPUs; only the first {DEVICES_MAX} are used.")
        count = DEVICES_MAX
    plain = plain_product(product)
    model = products.get(plain, plain)
    memory_mib = max(0, _number(labels, MEMORY, MEMORY_MAX_MIB, warnings))
    mig = _mig_devices(labels.get(MIG_DEVICES, "none"), count, warnings) if mode is Mode.EXACT else frozenset()
    return tuple(Device(model=model, memory_mib=memory_mib, mig_mode=slot in mig) for slot in range(count))


def _mig_devices(written: str, count: int, warnings: list[str]) -> frozenset[int]:
    """Return the devices that a label such as `0,2-3` names; a label that cannot be read names all.

    Label values of the API server hold no commas, so "." and "_" separate as well.
    """
    if written == "none":
        return frozenset()
    if written == "all":
        return frozenset(range(count))
    named: set[int] = set()
    readable = _SPANS.fullmatch(written) is not None
    for span in re.split(r"[,._]", written) if readable else ():
        first, _, last = span.partition("-")
        low, high = int(first), int(last or first)
        readable = readable and low <= high < count
        named.update(range(low, min(high, count - 1) + 1))
    if readable:
        return frozenset(named)
    warnings.append(f"label {MIG_DEVICES} must be all, none or device numbers; {shown(written)} is read as all.")
    return frozenset(range(count))
