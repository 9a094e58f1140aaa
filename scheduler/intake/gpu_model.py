"""When an entry of `tessera.dev/gpu-model` means a device."""

from __future__ import annotations

import re

_SUFFIX = re.compile(r"(?:-MIG-[^/]*?)?(?:-SHARED)?$", re.IGNORECASE)


def plain_product(product: str) -> str:
    """Return a product label without what sharing (`-SHARED`) and MIG (`-MIG-...`) append to it."""
    return _SUFFIX.sub("", product, count=1)


def matches(entry: str, model: str, product: str) -> bool:
    """Say whether an entry names a device, without regard to case.

    Args:
        entry: `H100-80`, `H100`, `NVIDIA-H100-PCIe` or `T4`.
        model: key of the geometry table, or the product label for a product that the table does not have.
        product: the label nvidia.com/gpu.product as it is; may be empty.

    Returns:
        True for the key itself, its family (the part before the first dash), the exact product label, or a whole
        token of it.
    """
    wish, key, label = entry.casefold(), model.casefold(), product.casefold()
    if not wish:
        return False
    plain = plain_product(label)
    return wish in {key, key.partition("-")[0], label, plain} or wish in plain.split("-")
