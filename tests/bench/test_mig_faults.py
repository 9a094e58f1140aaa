"""`bench mig-faults` plays every fault, and tells when a change ends anywhere between its two layouts.

Each run is a process of its own: one process knows one make-believe driver.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fakenvml.box import MODELS
from bench.mig_faults import CREATE, DESTROY, LOOK, Row, faults, models_of, report_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
from bench import mig_faults as bench
from bench.fakenvml.box import Box, build, load
from nodeagent import collect, journal, mig, nvml

def few(names, writes, *, deadly, real=bench.faults):
    works = bench.WORKS if deadly else set(names)
    return [one for one in real(names, writes, deadly=deadly) if not one.call or names[one.call - 1] in works]

bench.faults = few
exec(sys.argv[3])
folder = Path(sys.argv[1])
one = bench._Bench("A30-24", Box(load(build(folder)), folder).add("A30-24", 1), folder)
deed = next(deed for deed in one.deeds() if deed.name == sys.argv[2])
print(json.dumps(bench.report_of([one.run(deed)], "A30-24")))
"""
NOT_TAKEN_BACK = """
def walk(self, change, *, back, real=mig.Divider._walk):
    return "" if back else real(self, change, back=back)
mig.Divider._walk = walk
"""
FORGOTTEN = """
def recover(self):
    self._journal.load()
    self._journal.open.clear()
    self._loaded = True
    return []
mig.Divider.recover = recover
"""
NOT_ANNOUNCED = """
journal.Journal.started = lambda self, change, boot: self.open.update({change.device: (change, boot)})
"""
NOT_READ_IS_NONE = """
def divided(gpu, mode, real=collect.Collector._divided):
    return tuple(nvml.known(one) or [] for one in real(gpu, mode))
collect.Collector._divided = staticmethod(divided)
"""


def played(folder: Path, deed: str, broken: str = "") -> dict[str, Any]:
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on the PATH (on Debian, as root: apt-get install build-essential)")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, deed, broken], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("deed", "least"), [(CREATE, 40), (DESTROY, 40), ("restore", 80), (LOOK, 100)])
def test_every_fault_ends_with_the_old_layout_or_the_new_one(tmp_path: Path, deed: str, least: int) -> None:
    report = played(tmp_path, deed)
    assert report["findings"] == []
    assert (report["mixed_ready"], report["unrecovered"], report["missed"], report["ok"]) == (0, 0, 0, True)
    assert report["checked"] >= report["cases"] >= least


@pytest.mark.parametrize(
    ("deed", "broken", "key"),
    [
        (CREATE, NOT_TAKEN_BACK, "unrecovered"),
        (CREATE, FORGOTTEN, "unrecovered"),
        (DESTROY, NOT_ANNOUNCED, "mixed_ready"),
        (LOOK, NOT_READ_IS_NONE, "mixed_ready"),
    ],
)
def test_a_broken_agent_is_found_out(tmp_path: Path, deed: str, broken: str, key: str) -> None:
    report = played(tmp_path, deed, broken)
    assert report[key] > 0
    assert report["ok"] is False
    assert report["findings"]


def test_each_call_fails_and_is_died_at() -> None:
    names = ["nvmlDeviceGetMigMode", "nvmlDeviceGetMigMode", "nvmlGpuInstanceDestroy", "nvmlDeviceGetMigMode"]
    planned = list(faults(names, 2))
    assert {one.call for one in planned if one.code and one.times == 1} == {1, 2, 3, 4}
    assert {one.call for one in planned if one.die} == {1, 2, 3, 4}
    assert {(one.die, one.late) for one in planned if one.call == 3} == {(False, False), (False, True), (True, False),
                                                                       (True, True)}  # fmt: skip
    assert {(one.write, one.late, one.reboot) for one in planned if one.write} == {
        (write, late, reboot) for write in (1, 2) for late in (False, True) for reboot in (False, True)
    }
    assert len({one.what for one in planned}) == len(planned)
    assert not any(one.die for one in faults(names, 0, deadly=False))


def test_a_family_is_its_models() -> None:
    assert models_of("eight") == ("A100-40", "A100-80", "H100-80", "H200-141", "B200-180")
    assert {models_of(key) for key in MODELS} == {(key,) for key in MODELS}
    with pytest.raises(ValueError, match=r"--family is one of a30, eight, gb202, A30-24, .*; not V100\."):
        models_of("V100")


def test_a_fault_that_did_not_strike_is_no_case() -> None:
    row = Row("H100-80", CREATE, calls=1, cases=1, checked=2)
    assert report_of([row], "H100-80")["ok"]
    row.missed = 1
    assert not report_of([row], "H100-80")["ok"]
    assert not report_of([], "H100-80")["ok"]
