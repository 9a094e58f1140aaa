"""Where the Kubernetes binaries come from: a folder the user names, else one build into a cache.

The versions are those of `tests/controlplane/go.mod`, whose `tool` lines name the binaries. The cache lies outside
the work tree and is keyed by version and module files, so a change of either builds anew and nothing else does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.errors import BenchError

MODULE = Path(__file__).resolve().parent.parent / "tests" / "controlplane"
BINARIES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
_VERSION_PACKAGE = "k8s.io/component-base/version"
_PACKAGES_PER_LINE = 250


class UnavailableError(BenchError):
    """A real control plane cannot be had on this machine; the sentence says what to install."""


def find_binaries() -> Path:
    """Return the folder that holds the Kubernetes binaries, building them when the cache lacks them.

    A cold build takes some minutes and about 3 GB of Go cache; a second caller waits for the first.

    Raises:
        UnavailableError: `$TESSERA_KUBE_BIN` lacks a binary, `go` is missing, or the build failed.
    """
    named = os.environ.get("TESSERA_KUBE_BIN")
    if named:
        missing = [name for name in BINARIES if not (Path(named) / name).is_file()]
        if missing:
            raise UnavailableError(f"TESSERA_KUBE_BIN={named} has no {', '.join(missing)}; unset it to build them.")
        return Path(named).resolve()
    folder = cache_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _build(folder)
    return folder


def find_etcd() -> Path:
    """Return etcd's path.

    Raises:
        UnavailableError: etcd is not on the PATH.
    """
    found = shutil.which("etcd")
    if found is None:
        raise UnavailableError("etcd is not on the PATH; install it, on Debian: apt-get install etcd-server.")
    return Path(found)


def kube_version() -> str:
    """Return the Kubernetes version of the module, such as `v1.36.2`."""
    found = re.search(r"^\s*(?:require )?k8s\.io/kubernetes (v\S+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise UnavailableError(f"{MODULE / 'go.mod'} names no version of k8s.io/kubernetes.")
    return found[1]


def cache_folder() -> Path:
    """Return where this version's binaries are, or will be, kept."""
    digest = hashlib.sha256((MODULE / "go.mod").read_bytes() + (MODULE / "go.sum").read_bytes()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "tessera" / "kube" / f"{kube_version()}-{digest[:12]}"


def _build(folder: Path) -> None:
    """Build into a folder beside the final one and rename it, so that a half-built cache is never used."""
    go = shutil.which("go")
    if go is None:
        raise UnavailableError(
            "The Kubernetes binaries are not built and `go` is not on the PATH; install Go 1.26 or newer, "
            "or set TESSERA_KUBE_BIN to a folder with " + ", ".join(BINARIES) + "."
        )
    version = kube_version()
    major, minor = version.removeprefix("v").split(".")[:2]
    stamps = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    flags = " ".join(["-s", "-w", *(f"-X {_VERSION_PACKAGE}.{key}={value}" for key, value in stamps.items())])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    argv = [go, "build", "-v", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags]
    _say(f"building Kubernetes {version} into {folder} (once; some minutes)")
    begun = time.monotonic()
    log = folder.parent / "build.log"
    if _run_build([*argv, "-o", f"{partial}/", "tool"], log) != 0:
        raise UnavailableError(f"The build of Kubernetes {version} failed; its end ({log}):\n{_tail(log)}")
    partial.rename(folder)
    _say(f"built in {time.monotonic() - begun:.0f} s")


def _run_build(argv: list[str], log: Path) -> int:
    """Run go, keep all it says in `log`, count compiled packages on stderr; return the exit status."""
    compiled = 0
    with (
        log.open("w") as kept,
        subprocess.Popen(
            argv,
            cwd=MODULE,
            env={**os.environ, "CGO_ENABLED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as go,
    ):
        assert go.stdout is not None
        for line in go.stdout:
            kept.write(line)
            compiled += not line.startswith("go: ")
            if compiled and compiled % _PACKAGES_PER_LINE == 0:
                _say(f"{compiled} packages compiled")
    return go.returncode


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:])


def _say(text: str) -> None:
    print(f"[kube] {text}", file=sys.stderr, flush=True)
