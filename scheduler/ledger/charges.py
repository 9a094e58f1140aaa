"""What a Request takes of its queue's quota, key by key. Pure.

A pod counts in every key that matches. What only the node decides (the model of whole GPUs, the thousandths of a share
that names memory alone) is left open until a node is given: the charge with a node is never less than the one without.
Volumes are not charged: Tessera makes none yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from policies.columns import Kind
from scheduler.intake.gpu_model import matches, plain_product
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.node import Device, Node
from scheduler.model.pod import DeviceAsk, Request
from scheduler.model.queue import CPU_KEY, GPU_KEY, LIMIT_MAX, MEMORY_KEY, MIG_KEY, MILLI_KEY

MIB = 1 << 20


def charge_of(
    request: Request, model_keys: Iterable[str] = (), node: Node | None = None, slots: Collection[int] = ()
) -> dict[str, int]:
    """Return what a Request takes, by key; zeros are left out.

    Args:
        request: whose demand counts: the formula over all containers, devices reused by init containers once.
        model_keys: the model names that queues list, `Quota.model_keys`.
        node: the chosen node or a candidate; None = not known yet, so that no model is charged.
        slots: the chosen devices, where they are known; else all of the node may be among them.

    Returns:
        Whole GPUs, instances, thousandths, milli-CPU and MiB, each at most `LIMIT_MAX`.
    """
    amounts = request.amounts
    found = {CPU_KEY: amounts.cpu_milli, MEMORY_KEY: -(-amounts.memory_bytes // MIB)}
    found |= _devices(request.devices, model_keys, node, slots)
    return {key: min(amount, LIMIT_MAX) for key, amount in found.items() if amount > 0}


def _devices(ask: DeviceAsk, model_keys: Iterable[str], node: Node | None, slots: Collection[int]) -> dict[str, int]:
    if ask.kind is Kind.WHOLE:
        models = {key: _of_model(key, ask.count, node, slots) for key in model_keys} if node else {}
        return {GPU_KEY: ask.count, **models}
    if ask.kind is Kind.MIG:
        return {MIG_KEY + ask.profile: ask.count}
    if ask.kind is Kind.SHARE:
        return {MILLI_KEY: ask.count * (ask.milli or _milli(ask.memory_mib, node))}
    return {}


def _of_model(key: str, count: int, node: Node, slots: Collection[int]) -> int:
    """Return how many of `count` devices are, or may be, of a model."""
    there = [device for slot, device in enumerate(node.devices) if not slots or slot in slots]
    if not there:
        there = [Device(plain_product(node.product))]
    alike = sum(matches(key, device.model, node.product) for device in there)
    return count if alike == len(there) else min(count, alike)


def _milli(memory_mib: int, node: Node | None) -> int:
    """Return the thousandths of a share that names memory alone: on the smallest device; at least 1."""
    sizes = [device.memory_mib for device in node.devices if device.memory_mib] if node else []
    return max(1, 1000 * memory_mib // min(sizes)) if sizes else 1


def charge_of_allocation(cpu_milli: int, memory_mib: int, allocation: Allocation | None) -> dict[str, int]:
    """Return what is held by the ledger's own word, by key and without models: of a past life, or of a pod unknown.

    A share that two ordinary init containers use one after the other counts twice here: an Allocation does not tell.
    """
    grants = [grant for _, listed in allocation.containers for grant in listed] if allocation is not None else []
    found = {CPU_KEY: cpu_milli, MEMORY_KEY: memory_mib}
    seen: set[tuple[int, int]] = set()
    for grant in grants:
        if grant.dev >= 0 and grant.kind != "share":
            if (grant.dev, grant.start) in seen:
                continue
            seen.add((grant.dev, grant.start))
        key, amount = _granted(grant)
        found[key] = found.get(key, 0) + amount
    return {key: min(amount, LIMIT_MAX) for key, amount in found.items() if amount > 0}


def _granted(grant: Grant) -> tuple[str, int]:
    if grant.kind == "mig":
        return MIG_KEY + grant.profile, grant.count
    if grant.kind == "share":
        return MILLI_KEY, grant.milli * grant.count
    return GPU_KEY, grant.count
