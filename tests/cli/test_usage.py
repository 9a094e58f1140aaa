"""The command line where it is used wrongly, or asked about itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.kube import credentials
from tests.cli.stage import tessera

Capture = pytest.CaptureFixture[str]


async def test_wrong_use_names_the_help_of_its_own_command(capsys: Capture) -> None:
    assert (await tessera(capsys, "serve", "--never")).err.endswith("Try: tessera serve --help\n")
    assert (await tessera(capsys, "ledger", "verify", "x")).err.endswith("Try: tessera ledger verify --help\n")


async def test_alone_it_shows_its_help_and_nothing_after_it(capsys: Capture) -> None:
    said = await tessera(capsys)
    assert said.code == 64
    assert "Usage" in said.out + said.err
    assert "Try:" not in said.err


async def test_it_tells_its_version(capsys: Capture) -> None:
    said = await tessera(capsys, "--version")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("tessera 0.")


async def test_a_state_folder_that_cannot_be_made_is_a_sentence(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_STATE", "/dev/null/ledger")
    said = await tessera(capsys, "serve", "--embedded", ".")
    assert said.code == 1
    assert "/dev/null/ledger" in said.err
    assert "TESSERA_STATE" in said.err


async def test_the_ledger_is_looked_for_where_serve_keeps_it(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_STATE", "/dev/null/ledger")
    said = await tessera(capsys, "ledger", "verify")
    assert (said.code, said.out) == (1, "")
    assert "sqlite:////dev/null/ledger/ledger.db" in said.err


@pytest.mark.parametrize("arguments", [[], ["pod", "--all"], ["--never"]])
async def test_release_wants_one_pod_or_all(capsys: Capture, arguments: list[str]) -> None:
    said = await tessera(capsys, "release", *arguments)
    assert said.code == 64
    assert said.err.endswith("Try: tessera release --help\n")


async def test_release_without_an_api_server_is_a_sentence_and_an_object(capsys: Capture, tmp_path: Path) -> None:
    said = await tessera(capsys, "release", "--all", "--json", f"--kubeconfig={tmp_path / 'none'}")
    assert said.code == 1
    assert "Cannot read kubeconfig" in said.err
    assert json.loads(said.out)["ok"] is False


@pytest.mark.parametrize(("default", "named"), [("{0}/a:{0}/b", "no {0}/a and no {0}/b"), ("", "$KUBECONFIG")])
async def test_doctor_without_any_kubeconfig_is_one_sentence(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: str, named: str
) -> None:
    monkeypatch.setattr(credentials.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", default.format(tmp_path))
    said = await tessera(capsys, "doctor")
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith("tessera: There is no kubeconfig: ")
    assert named.format(tmp_path) in said.err
    assert "--kubeconfig FILE" in said.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--tls-cert=a", "--tls-key=b"],
        ["--webhook=127.0.0.1:0", "--tls-cert=a"],
        ["--webhook=127.0.0.1:0", "--tls-key=a"],
    ],
)
async def test_the_webhooks_files_belong_together(capsys: Capture, flags: list[str]) -> None:
    said = await tessera(capsys, "serve", "--embedded=.", *flags)
    assert said.code == 64
    assert "--tls-cert and --tls-key belong together" in said.err
