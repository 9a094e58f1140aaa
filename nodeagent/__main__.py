"""Entry point of `tessera-agent` and `python -m nodeagent`: once, as a doctor, or until it is told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from nodeagent.agent import Agent, Places
from nodeagent.doctor import FAIL, MODES, OBSERVED, Check, examine
from nodeagent.report import Report, encode
from nodeagent.watching import watch

if TYPE_CHECKING:
    from nodeagent.stream import Uplink

USAGE = 64
_TOKEN = Path("/var/run/secrets/tessera/token")
_SAMPLE_S = 0.2  # GPM measures between two samples more than 100 ms apart
_INTERVALS_S = (0.5, 60.0)  # the driver's own figures are means over up to a second


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"tessera-agent: {message}\n")


def _common(parser: argparse.ArgumentParser, *, again: bool) -> None:
    """Add the options that stand before or behind the command; what is not said `again` keeps its value."""
    host = Places()

    def add(flag: str, default: object, words: str, **how: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS if again else default, help=words, **how)

    add("--json", default=False, words="one JSON object as the last line of stdout", action="store_true")
    add("--proc", host.proc, "the host's /proc", type=Path)
    add("--sys", host.sys, "the host's /sys", type=Path)
    add("--kubelet", host.kubelet, "the kubelet's folder", type=Path)
    add("--logs", host.logs, "the kubelet's container logs, for names of pods", type=Path)
    add("--mode", OBSERVED, "how this node gives out GPUs", choices=MODES)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tessera-agent", description="Reports the GPUs of this machine; changes nothing.")
    _common(parser, again=False)
    parser.add_argument("--version", action="version", version=f"tessera-agent {_version()}")
    parser.add_argument("--once", action="store_true", help="report once and end")
    parser.add_argument("--node", default=os.environ.get("NODE_NAME") or socket.gethostname(), help="name of the node")
    parser.add_argument("--metrics", default=":9090", type=_address, metavar="HOST:PORT", help="where /metrics is")
    parser.add_argument(
        "--tessera", metavar="URL", help="wss://HOST:PORT of Tessera's port for agents; none by default"
    )
    parser.add_argument("--token", type=Path, default=_TOKEN, help="file with this pod's projected token")
    parser.add_argument("--ca", type=Path, help="CA of Tessera's certificate (PEM); default: those of the system")
    parser.add_argument(
        "--spool", type=Path, metavar="DIR", help="keep there what Tessera misses; default: keep nothing"
    )
    parser.add_argument("--no-dcgm-names", action="store_true", help="leave DCGM's names out of /metrics")
    parser.add_argument("--interval", default=5.0, type=_interval, metavar="SECONDS", help="between two looks")
    commands = parser.add_subparsers(dest="command", parser_class=_Parser)
    _common(commands.add_parser("doctor", help="is the machine as the agent needs it?"), again=True)
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT such as 127.0.0.1:9090 or :9090")
    return host.strip("[]"), int(port)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _INTERVALS_S[0] <= seconds <= _INTERVALS_S[1]:
        low, high = _INTERVALS_S
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds between {low:g} and {high:g}")
    return seconds


def _version() -> str:
    try:
        return version("tessera-scheduler")
    except PackageNotFoundError:
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; exit 0 = well, 1 = something is wrong, 64 = usage."""
    options = _parser().parse_args(arguments)
    places = Places(options.proc, options.sys, options.kubelet, options.logs)
    if options.command == "doctor":
        sys.exit(_doctor(places, options.mode, as_json=options.json))
    agent = Agent(
        node=options.node, version=_version(), places=places, wall_us=lambda: time.time_ns() // 1000,
        monotonic=time.monotonic,
    )  # fmt: skip
    try:
        sys.exit(_once(agent, as_json=options.json) if options.once else _watch(agent, options))
    except OSError as error:
        sys.exit(f"tessera-agent: {error}")
    finally:
        agent.close()


def _doctor(places: Places, mode: str, *, as_json: bool) -> int:
    found = examine(places, mode=mode)
    ok = not any(one.status == FAIL for one in found)
    if as_json:
        _say_json({"checks": [asdict(one) for one in found]}, ok=ok)
    else:
        width = max(len(one.check) for one in found)
        sys.stdout.writelines(_line(one, width) for one in found)
    return 0 if ok else 1


def _line(one: Check, width: int) -> str:
    do = f"{'':{width + 7}}-> {one.do}\n" if one.do else ""
    return f"{one.status:<5}{one.check:<{width}}  {one.text}\n{do}"


def _once(agent: Agent, *, as_json: bool) -> int:
    agent.look()
    threading.Event().wait(_SAMPLE_S)
    report = agent.look()
    ok = report.problem is None and not report.lost
    if as_json:
        _say_json(orjson.loads(encode(report)), ok=ok)
    else:
        _print(report)
    return 0 if ok else 1


def _print(report: Report) -> None:
    for device in report.devices:
        used, memory = device.activity.memory_used_mib or 0, device.memory_mib
        slices = f"  {len(device.slices)} slices" if device.slices else ""
        sys.stdout.write(
            f"{device.index:>2}  {device.name}  {device.uuid}  {used}/{memory} MiB  {device.health.state}{slices}\n"
        )
    for lost in report.lost:
        sys.stdout.write(f"{lost.index:>2}  {lost.uuid or 'unknown'}  {lost.why}\n")
    for said in (*([report.problem] if report.problem else []), *report.notes):
        sys.stderr.write(f"tessera-agent: {said}\n")


def _say_json(body: dict[str, object], *, ok: bool) -> None:
    sys.stdout.write(orjson.dumps({**body, "seed": None, "ok": ok}).decode() + "\n")


def _watch(agent: Agent, options: argparse.Namespace) -> int:
    """Look every few seconds and serve what was seen, until a signal comes."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    uplink = _uplink(options) if options.tessera else None
    try:
        return watch(
            agent, stop, address=options.metrics, interval_s=options.interval, dcgm=not options.no_dcgm_names,
            uplink=uplink,
        )  # fmt: skip
    finally:
        if uplink is not None:
            uplink.close()


def _uplink(options: argparse.Namespace) -> Uplink:
    """Begin to report to Tessera."""
    from nodeagent.stream import Tessera, Uplink  # noqa: PLC0415 - a third of the agent's memory, where it is wanted

    tessera = Tessera(options.tessera, options.token, options.ca, options.spool)
    try:
        tessera.check()
    except ValueError as error:
        sys.stderr.write(f"tessera-agent: --tessera: {error}\n")
        sys.exit(USAGE)
    rng = Random(os.urandom(8))  # noqa: S311 - spreads the tries of many agents
    return Uplink(tessera, rng=rng, say=lambda text: print(f"tessera-agent: {text}", file=sys.stderr))  # noqa: T201


if __name__ == "__main__":
    main()
