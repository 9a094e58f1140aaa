"""What an entry of gpu-model means, and the products of the shipped table."""

from __future__ import annotations

import pytest

from scheduler.geometry import products
from scheduler.intake.gpu_model import matches, plain_product

H100 = ("H100-80", "NVIDIA-H100-80GB-HBM3")
T4 = ("Tesla-T4", "Tesla-T4")


@pytest.mark.parametrize(
    ("entry", "model", "product", "expected"),
    [
        ("H100-80", *H100, True),
        ("h100-80", *H100, True),
        ("H100", *H100, True),
        ("nvidia-h100-80gb-hbm3", *H100, True),
        ("HBM3", *H100, True),
        ("H100-94", *H100, False),
        ("H10", *H100, False),
        ("H100-", *H100, False),
        ("100", *H100, False),
        ("80", *H100, False),
        ("", *H100, False),
        ("H100-80GB", *H100, False),
        ("T4", *T4, True),
        ("tesla-t4", *T4, True),
        ("T", *T4, False),
        ("GH200", "GH200-144", "NVIDIA-GH200-144G-HBM3e", True),
        ("H200", "GH200-144", "NVIDIA-GH200-144G-HBM3e", False),
        ("A100", "A100-40", "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", True),
        ("NVIDIA-A100-SXM4-40GB", "A100-40", "NVIDIA-A100-SXM4-40GB-SHARED", True),
        ("NVIDIA-A100-SXM4-40GB-SHARED", "A100-40", "NVIDIA-A100-SXM4-40GB-SHARED", True),
        ("SHARED", "A100-40", "NVIDIA-A100-SXM4-40GB-SHARED", False),
        ("RTXPRO6000", "RTXPRO6000", "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition", True),
        ("V100M16", "V100M16", "V100M16", True),
        ("V100", "V100M16", "V100M16", False),
        ("H100-80", "H100-80", "", True),
        ("X", "", "", False),
    ],
)
def test_entries(entry: str, model: str, product: str, expected: bool) -> None:
    assert matches(entry, model, product) is expected


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ("NVIDIA-A30", "NVIDIA-A30"),
        ("NVIDIA-A30-SHARED", "NVIDIA-A30"),
        ("NVIDIA-A30-MIG-1g.6gb", "NVIDIA-A30"),
        ("NVIDIA-A30-MIG-1g.6gb-SHARED", "NVIDIA-A30"),
        ("NVIDIA-A30-MIG-INVALID", "NVIDIA-A30"),
        ("SHARED", "SHARED"),
        ("", ""),
    ],
)
def test_what_sharing_and_mig_append(product: str, expected: str) -> None:
    assert plain_product(product) == expected


def test_products_of_the_table() -> None:
    table = products()
    assert table["NVIDIA-H100-80GB-HBM3"] == "H100-80"
    assert table["NVIDIA-A100-SXM4-40GB"] == "A100-40"
    assert len(set(table.values())) == 12
    assert products() is table
