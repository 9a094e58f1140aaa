from __future__ import annotations

from pathlib import Path

import pytest

from bench import kube_binaries
from bench.kube_binaries import BINARIES, UnavailableError, cache_folder, find_binaries, kube_version


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TESSERA_KUBE_BIN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def test_the_named_folder_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(tmp_path / "mine", *BINARIES)
    monkeypatch.setenv("TESSERA_KUBE_BIN", str(tmp_path / "mine"))
    assert find_binaries() == tmp_path / "mine"


def test_a_named_folder_that_lacks_one_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(tmp_path / "mine", *BINARIES[1:])
    monkeypatch.setenv("TESSERA_KUBE_BIN", str(tmp_path / "mine"))
    with pytest.raises(UnavailableError, match=f"has no {BINARIES[0]};"):
        find_binaries()


def test_the_cache_is_used_and_named_after_version_and_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = cache_folder()
    assert folder.parent == tmp_path / "tessera" / "kube"
    assert folder.name.startswith(kube_version() + "-")
    fill(folder, *BINARIES)
    assert find_binaries() == folder
    other = tmp_path / "module"
    other.mkdir()
    (other / "go.mod").write_text((kube_binaries.MODULE / "go.mod").read_text())
    (other / "go.sum").write_text("changed\n")
    monkeypatch.setattr(kube_binaries, "MODULE", other)
    assert cache_folder() != folder


def test_without_go_it_says_what_to_install() -> None:
    with pytest.raises(UnavailableError, match=r"install Go 1\.26"):
        find_binaries()


def test_without_etcd_it_says_what_to_install() -> None:
    with pytest.raises(UnavailableError, match="apt-get install etcd-server"):
        kube_binaries.find_etcd()


def test_a_failed_build_leaves_no_cache_and_shows_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go = tmp_path / "tools" / "go"
    go.parent.mkdir()
    go.write_text("#!/bin/sh\necho no such module\nexit 1\n")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", str(go.parent))
    with pytest.raises(UnavailableError, match="no such module"):
        find_binaries()
    assert not cache_folder().exists()
