from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from bench.child import Child

PARENT = """
import sys
from pathlib import Path
from bench.child import Child
child = Child("sleep", ["sleep", "600"], Path(sys.argv[1]))
while b"setpriv" in Path(f"/proc/{child.pid}/cmdline").read_bytes():
    pass
print(child.pid, flush=True)
sys.stdin.read()
"""


async def test_stop_returns_how_it_ended(tmp_path: Path) -> None:
    child = Child("sleep", ["sleep", "600"], tmp_path / "log")
    assert child.alive
    assert await child.stop() == -signal.SIGTERM
    assert not child.alive


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    )
    child = Child("deaf", [sys.executable, "-c", deaf], tmp_path / "log")
    while "deaf" not in child.tail():
        os.sched_yield()
    assert await child.stop(timeout_s=0.2) == -signal.SIGKILL


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(argv, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        # A pidfd becomes readable when its process ends; this waits for that and nothing else.
        ended, _, _ = select.select([child], [], [], 10)
    os.close(child)
    assert ended
