"""Drives a make-believe machine with GPUs: builds the library, writes the machine, and changes it while others look.

One library in the process serves both sides: pynvml calls its NVML functions, a Box its controls. Another process
joins by the environment of `Box.environment`. Which GPUs and MIG profiles there are comes from the project's geometry
table; the C code has none.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
GEOMETRY = HERE.parent.parent / "scheduler" / "model" / "mig-geometry.yaml"
SOURCES = tuple(HERE / name for name in ("box.c", "device.c", "mig.c", "live.c"))
LIBRARY = "libnvidia-ml.so.1"
NOBODY = 0xFFFFFFFF
XID = 8
EVENT_TYPES = 0x1 | 0x2 | XID | 0x100 | 0x4000 | 0x8000
GIB = 2**30
MIB = 2**20

# What sets one model apart, beyond its geometry: memory in MiB, architecture, compute capability, watts, links, PCIe.
MODELS: Mapping[str, tuple[int, int, tuple[int, int], int, int, bool, int]] = {
    "A30-24": (24576, 7, (8, 0), 165, 4, False, 4),
    "A100-40": (40960, 7, (8, 0), 400, 12, True, 4),
    "A100-80": (81920, 7, (8, 0), 400, 12, True, 4),
    "H100-80": (81559, 9, (9, 0), 700, 18, True, 5),
    "H200-141": (143771, 9, (9, 0), 700, 18, True, 5),
    "B200-180": (183359, 10, (10, 0), 1000, 18, True, 5),
    "RTXPRO6000": (97887, 10, (12, 0), 600, 0, False, 5),
}
HOPPER = 9


@cache
def geometry() -> dict[str, Any]:
    """Return the project's geometry table."""
    table: dict[str, Any] = yaml.safe_load(GEOMETRY.read_text(encoding="utf-8"))
    return table


def build(folder: Path, *, without: Sequence[str] = ()) -> Path:
    """Compile the library into a folder, leaving out functions as an older driver would."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "no C compiler: on Debian, apt-get install gcc libc6-dev"
    made = folder / LIBRARY
    hidden = folder / "hidden.map"
    hidden.write_text("{ local: " + "".join(f"{name};" for name in without or ("nothing",)) + " };")
    flags = "-shared -fPIC -O1 -Wall -Wextra -fvisibility=hidden -pthread".split()
    links = [f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script={hidden}"]
    subprocess.run([compiler, *flags, *links, "-o", made, *SOURCES], check=True)
    return made


def load(path: Path) -> ctypes.CDLL:
    """Load a built library with the types of its controls."""
    library = ctypes.CDLL(str(path))
    u32, i32, i64, text = ctypes.c_uint32, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    library.fake_create.argtypes = [text, text]
    library.fake_device.argtypes = [text, text, text, text, *[u32] * 9]
    library.fake_profile.argtypes = [u32, u32, text, *[i32] * 7, i64, i32, ctypes.POINTER(i32)]
    library.fake_set.argtypes = [u32, text, i64]
    library.fake_get.argtypes = [u32, text]
    library.fake_get.restype = i64
    library.fake_process.argtypes = [u32, u32, i64, u32, u32, u32, u32]
    library.fake_gpm.argtypes = [u32, u32, u32, ctypes.c_double]
    library.fake_event.argtypes = [u32, ctypes.c_uint64, ctypes.c_uint64, u32, u32]
    library.fake_fault.argtypes = [text, *[i32] * 7]
    library.fake_called.argtypes = [u32]
    library.fake_called.restype = text
    library.fake_tick.argtypes = [i64]
    return library


class Box:
    """One machine: GPUs of one model, unless more are added."""

    def __init__(self, library: ctypes.CDLL, folder: Path, *, driver: str = "580.95.05") -> None:
        self._library = library
        self.folder = folder
        self.state = folder / "box.state"
        self.count = 0
        assert library.fake_create(str(self.state).encode(), driver.encode()) == 0
        self._write_boot_id()

    def add(self, model: str, count: int = 8) -> Box:
        """Put in GPUs of a model; the first half sits on NUMA node 0."""
        gpu, family = geometry()["gpus"][model], geometry()["families"][geometry()["gpus"][model]["family"]]
        memory_mib, arch, (major, minor), watts, links, switch, generation = MODELS[model]
        product = gpu["product"][0].replace("-", " ")
        for at in range(count):
            engines = family["engines"]
            index = self._library.fake_device(
                product.encode(), self.uuid(self.count).encode(), f"16524230{self.count:05d}".encode(),
                f"00000000:{0x18 + 8 * self.count:02X}:00.0".encode(), 0x18 + 8 * self.count, gpu["pci"][0], arch,
                major, minor, family["memSlices"], family["computeSlices"], engines.get("dec", 0), engines["ofa"],
            )  # fmt: skip
            assert index == self.count
            self.count += 1
            self._profiles(index, gpu, family, memory_mib)
            self.set(
                index, mem_total=memory_mib * MIB, mem_reserved=640 * MIB, power_mw=watts * 150,
                power_limit_mw=watts * 1000, energy_mj=10**9, temp_gpu=35, temp_mem=40 if arch >= HOPPER else -3,
                temp_shutdown=92, temp_slowdown=89, clock_sm=1410, clock_mem=1593, clock_max_sm=1980,
                clock_max_mem=2619, throttle=1, pcie_gen=generation, pcie_gen_max=generation, pcie_width=16,
                pcie_width_max=16, ecc_mode=1, ecc_pending=1, retired_sbe=-3, retired_dbe=-3, numa=2 * at // count,
                minor=index, nvlinks=links, nvlink_switch=int(switch), persistence=1, gpm=int(arch >= HOPPER),
                mig_capable=1, mig_needs_reset=int(arch < HOPPER), event_types=EVENT_TYPES,
                recovery=0 if arch >= HOPPER else -3,
            )  # fmt: skip
        return self

    def _profiles(self, index: int, gpu: Mapping[str, Any], family: Mapping[str, Any], memory_mib: int) -> None:
        for shape, profile, row, g, size, most, starts, media in family["shapes"]:
            names = gpu["names"].get(shape)
            if names is None:
                continue
            name = names if isinstance(names, str) else names[0]
            gib = gpu.get("gib", {}).get(shape)
            memory = round(gib * 1024) if gib else memory_mib * size // family["memSlices"]
            sms = gpu.get("sm", {}).get(shape, 16 * g)
            span = (ctypes.c_int32 * len(starts))(*starts)
            assert self._library.fake_profile(
                index, row, name.encode(), profile, g, size, most, media.get("dec", 0), media.get("ofa", 0), sms,
                memory, len(starts), span,
            ) == 0  # fmt: skip

    @staticmethod
    def uuid(index: int) -> str:
        """Return the UUID of a GPU."""
        return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, str(index))}"

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs to see this machine through the plain pynvml."""
        return {"FAKENVML_STATE": str(self.state)}

    @property
    def boot_id(self) -> Path:
        """The file in which the kernel would name this start of the machine."""
        return self.folder / "boot_id"

    def refresh(self) -> None:
        """Have the machine's other files say what its state says, which somebody has overwritten."""
        self._write_boot_id()

    def _write_boot_id(self) -> None:
        self.boot_id.write_text(f"{uuid.uuid5(uuid.NAMESPACE_OID, f'boot {self._library.fake_boot()}')}\n")

    def set(self, index: int, **values: int) -> None:
        """Change values by name; below zero = the NVML error code that reading it answers."""
        for name, value in values.items():
            assert self._library.fake_set(index, name.encode(), value) == 0, name

    def get(self, index: int, name: str) -> int:
        """Return a value by name."""
        return int(self._library.fake_get(index, name.encode()))

    def mig(self, index: int, *, on: bool = True) -> None:
        """Switch MIG as if it had been so for long."""
        self.set(index, mig_current=int(on), mig_pending=int(on))

    def run(
        self, index: int, pid: int, memory: int, *, gi: int = NOBODY, ci: int = NOBODY, sm: int = 0, mps: bool = False
    ) -> None:
        """Start a process on a GPU or on an instance."""
        assert self._library.fake_process(index, pid, memory, gi, ci, sm, int(mps)) == 0

    def end(self, index: int, pid: int, *, gi: int = NOBODY, ci: int = NOBODY) -> None:
        """End a process."""
        assert self._library.fake_process(index, pid, -1, gi, ci, 0, 0) == 0

    def gpm(self, index: int, metric: int, percent: float, *, gi: int = NOBODY) -> None:
        """Set a GPM metric of a GPU or of an instance."""
        assert self._library.fake_gpm(index, gi, metric, percent) == 0

    def event(self, index: int, *, kind: int = XID, data: int = 0, gi: int = NOBODY, ci: int = NOBODY) -> None:
        """Have the driver tell something."""
        self._library.fake_event(index, kind, data, gi, ci)

    def fault(
        self, call: str, *, gpu: int = -1, nth: int = 1, times: int = 10**6, code: int = 0, sleep_ms: int = 0,
        die: bool = False, late: bool = False,
    ) -> None:  # fmt: skip
        """Plan a fault of a function, `*` = of any: sleep, then die or answer the code; `late` = with the work done."""
        assert self._library.fake_fault(call.encode(), gpu, nth, times, code, sleep_ms, int(die), int(late)) >= 0

    def heal(self) -> None:
        """Forget all planned faults."""
        self._library.fake_heal()

    @property
    def calls(self) -> int:
        """How many NVML functions were called."""
        return int(self._library.fake_calls())

    def called(self, since: int) -> list[str]:
        """Return the functions that were called since `calls` was that; the last 1024 are known."""
        return [self._library.fake_called(at).decode() for at in range(since, self.calls)]

    def wait(self, seconds: float) -> None:
        """Let time pass without waiting."""
        self._library.fake_tick(round(seconds * 1000))

    def privileged(self, *, yes: bool) -> None:
        """Say whether callers may divide GPUs and see how they are divided."""
        self._library.fake_privileged(int(yes))

    def lose(self, index: int, code: int = 15) -> None:
        """Have a GPU answer every call with an error code."""
        self.set(index, lost=code)

    def remove_last(self) -> None:
        """Take the last GPU out."""
        self._library.fake_remove_last()
        self.count -= 1

    def reset(self, index: int) -> None:
        """Reset a GPU: no instance is left."""
        self._library.fake_reset_gpu(index)

    def reboot(self) -> None:
        """Start the machine anew: no instance is left, and MIG is off where the mode is not kept."""
        self._library.fake_reboot()
        self._write_boot_id()
