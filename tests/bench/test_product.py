from __future__ import annotations

from pathlib import Path

import pytest

from bench.product import Product, ProductError


async def test_a_tessera_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    product = Product(tmp_path, tmp_path / "absent.kubeconfig")
    with pytest.raises(ProductError, match="ended while starting") as error:
        await product.start()
    assert "absent.kubeconfig" in str(error.value)
    with pytest.raises(ProductError, match="ended by itself"):
        product.check()
    await product.kill()
    product.check()
    assert (product.ready_s, product.extender) == ([], "")


async def test_without_a_ledger_there_is_nothing_to_export(tmp_path: Path) -> None:
    product = Product(tmp_path, tmp_path / "absent.kubeconfig")
    with pytest.raises(ProductError, match="export failed"):
        await product.export_journal(tmp_path / "journal.jsonl")
