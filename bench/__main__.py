"""The benches' command line: `python -m bench COMMAND ... --json`."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from bench.errors import BenchError
from bench.oracle import Json

FAILED, USAGE = 1, 64
_CLICK_USAGE = 2
Say = Callable[[str], None]

app = typer.Typer(
    help="Benches; each checks its own answers and fails when one is wrong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


@app.callback()
def bench() -> None:
    """Benches; each checks its own answers and fails when one is wrong."""


@app.command()
def cluster(
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 200,
    pods: Annotated[int, typer.Option(min=1, help="Pods to create.")] = 1000,
    way: Annotated[str, typer.Option(help="The pods' way: direct or queue.")] = "direct",
    queues: Annotated[Path | None, typer.Option(help="Queue documents (YAML).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 1,
    kills: Annotated[int, typer.Option(min=0, help="SIGKILLs, each while a pod is in flight.")] = 0,
    dump: Annotated[Path | None, typer.Option(help="Folder for what the auditor reads, and logs.")] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of ask the pods are drawn from.")] = "none,whole,mig,share",
    trace: Annotated[str | None, typer.Option(help="Trace to replay, such as openb:default.")] = None,
    traces: Annotated[
        Path | None, typer.Option(envvar="TESSERA_TRACES", help="Folder of traces; a built-in stand-in without it.")
    ] = None,
    drop_refused: Annotated[bool, typer.Option(help="Delete refused pods (traces).")] = False,
    arrivals: Annotated[int, typer.Option(min=0, help="Of a trace, only so many; 0 = all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run Tessera beside a real kube-scheduler under load and SIGKILL, and audit the dump."""
    if way not in {"direct", "queue"}:
        _refuse(f"--way is direct or queue, not {way}.")
    if queues is not None and not queues.is_file():
        _refuse(f"--queues: there is no file {queues}.")
    if trace or drop_refused:
        if not trace or not drop_refused:
            _refuse("--trace and --drop-refused go together: pods of a trace stay, and refused ones are deleted.")
        _replay((trace, traces, seed), dump, most=arrivals, held=way == "queue", as_json=as_json)
    if kills > pods // 5:
        _refuse(f"{kills} kills need at least {kills * 5} pods, so that one is in flight at each.")
    from bench.cluster import Settings, run_cluster  # noqa: PLC0415 - usage errors need no aiohttp
    from bench.workload import UnreachableError  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory(prefix="tessera-dump-") as temporary:
        settings = Settings(
            nodes=nodes,
            pods=pods,
            seed=seed,
            kills=kills,
            dump=dump or Path(temporary),
            kinds=_kinds(kinds),
            held=way == "queue",
            queues=queues.resolve() if queues else None,
        )
        _run(lambda say: run_cluster(settings, say), seed=seed, as_json=as_json, usage=UnreachableError)


def _replay(what: tuple[str, Path | None, int], dump: Path | None, *, most: int, held: bool, as_json: bool) -> NoReturn:
    """Run a trace (its name, where traces lie, the seed) instead of the mix."""
    from bench.trace import TraceError  # noqa: PLC0415 - as in cluster
    from bench.trace_run import Settings, run_trace  # noqa: PLC0415 - as in cluster

    with tempfile.TemporaryDirectory(prefix="tessera-dump-") as temporary:
        settings = Settings(*what, dump or Path(temporary), most, held)
        _run(lambda say: run_trace(settings, say), seed=what[2], as_json=as_json, usage=TraceError)


@app.command()
def soak(
    *,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 30,
    first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each cluster.")] = 8,
    pods: Annotated[int, typer.Option(min=1, help="Pods of each cluster.")] = 48,
    kinds: Annotated[str, typer.Option(help="Kinds of ask the pods are drawn from.")] = "none,whole,mig,share",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Run the mix of `cluster` on many small clusters in memory, and audit each."""
    from bench import soak as soaking  # noqa: PLC0415 - as in cluster

    size = soaking.Size(nodes=nodes, pods=pods, kinds=_kinds(kinds))
    _finish(soaking.soak(range(first, first + seeds), size, _narrator(), jobs=jobs), as_json=as_json)


@app.command()
def throughput(
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 5000,
    pods: Annotated[int, typer.Option(min=1, help="Pods per arm and round.")] = 800,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the figures are medians.")] = 3,
    way: Annotated[str, typer.Option(help="The pods' way: direct or queue.")] = "direct",
    as_json: AsJson = False,
) -> None:
    """Pods per second with Tessera and without, interleaved on one real control plane."""
    if way not in {"direct", "queue"}:
        _refuse(f"--way is direct or queue, not {way}.")
    from bench import throughput as rates  # noqa: PLC0415 - as in cluster

    settings = rates.Settings(nodes, pods, rounds, way)
    _run(lambda say: rates.run_throughput(settings, say), seed=None, as_json=as_json, show=rates.show)


@app.command()
def latency(
    *,
    nodes: Annotated[str, typer.Option(help="Sizes of the cluster.")] = "500,5000,50000",
    k: Annotated[str, typer.Option(help="How many nodes /filter names.")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all arms; figures are medians over them.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of clusters and pods.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time kube-scheduler waits for /filter and /prioritize, beside a canned answer on the same HTTP stack."""
    sizes, counts = _numbers(nodes, "--nodes", 32), _numbers(k, "--k", 1)
    from bench import latency as waits  # noqa: PLC0415 - as in cluster

    settings = waits.Settings(sizes, counts, rounds, seed)
    _run(lambda say: waits.run_latency(settings, say), seed=seed, as_json=as_json, show=waits.show)


@app.command()
def coldstart(
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes with 8 GPUs each.")] = 1000,
    pods: Annotated[int, typer.Option(min=1, help="Bound pods.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Seconds from the start of a killed Tessera to its ready line, on a real API server."""
    from bench import coldstart as starts  # noqa: PLC0415 - as in cluster

    _run(lambda say: starts.run_coldstart(nodes, pods, say), seed=None, as_json=as_json)


@app.command()
def hostile(
    *,
    port: Annotated[str, typer.Option(help="Whose port: extender, webhook, agents or api.")] = "extender",
    bodies: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all requests.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Requests nobody should send, against a real Tessera process: no crash, no change of state."""
    if port not in {"extender", "webhook", "agents", "api"}:
        _refuse(f"--port is extender, webhook, agents or api, not {port}.")
    from bench import hostile as attacks  # noqa: PLC0415 - as in cluster

    _run(lambda say: attacks.run_hostile(port, bodies, seed, say), seed=seed, as_json=as_json)


@app.command()
def admission(
    *,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the pods.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Create every pod of a table on a real API server, while the webhook is up and while it is down."""
    from bench.admission import run_admission  # noqa: PLC0415 - as in cluster

    _run(lambda say: run_admission(seed, say), seed=seed, as_json=as_json)


@app.command()
def crash(
    *,
    points: Annotated[str, typer.Option(help="Where Tessera dies, such as C3-C5,C8.")] = "C3-C8",
    each: Annotated[int, typer.Option(min=1, help="Trials of each.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the passings at which it dies.")] = 1,
    dump: Annotated[Path | None, typer.Option(help="Folder for the dump and the logs of each trial.")] = None,
    as_json: AsJson = False,
) -> None:
    """Kill Tessera at each point between a reservation and its Binding, and see everybody come through."""
    from bench import crash as deaths  # noqa: PLC0415 - as in cluster

    try:
        chosen = deaths.read_points(points)
    except ValueError as error:
        _refuse(str(error))
    with tempfile.TemporaryDirectory(prefix="tessera-dump-") as temporary:
        settings = deaths.Settings(chosen, each, seed, dump or Path(temporary))
        _run(lambda say: deaths.run_crash(settings, say), seed=seed, as_json=as_json, show=deaths.show)


@app.command("mig-faults")
def mig_faults(
    *,
    family: Annotated[str, typer.Option(help="A family of the geometry, such as eight, or a GPU key.")] = "H100-80",
    as_json: AsJson = False,
) -> None:
    """Fail every driver call of every MIG change, and die at each: the old layout or the new one, never a mix."""
    from bench import mig_faults as changes  # noqa: PLC0415 - as in cluster

    try:
        report = changes.run_mig_faults(family, _narrator())
    except ValueError as error:
        _refuse(str(error))
    except BenchError as error:
        _finish({"seed": None, "ok": False, "error": str(error)}, as_json=as_json)
    changes.show(report)
    _finish(report, as_json=as_json, shown=True)


@app.command()
def wake(
    *,
    held: Annotated[int, typer.Option(min=1, help="Pods that wait in queues.")] = 300,
    freed: Annotated[int, typer.Option(min=1, help="Running pods that end.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of which pods end, and when.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Milliseconds from the end of a pod to the nodeName of the one that waited for its place, on a full cluster."""
    if freed > held:
        _refuse(f"{freed} pods can only be followed by as many that wait: --held is at least --freed, not {held}.")
    from bench import wake as heirs  # noqa: PLC0415 - as in cluster

    settings = heirs.Settings(held, freed, seed)
    _run(lambda say: heirs.run_wake(settings, say), seed=seed, as_json=as_json, show=heirs.show)


@app.command("queue-turn")
def queue_turn(
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 5000,
    requests: Annotated[int, typer.Option(min=1, help="Requests that wait.")] = 10_000,
    store: Annotated[str, typer.Option(help="Where decisions are committed: none or sqlite.")] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Seed of nodes and requests.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Decisions a second of one turn of the queue, and how long /filter waits while it runs."""
    if store not in {"none", "sqlite"}:
        _refuse(f"--store is none or sqlite, not {store}.")
    from bench import queue_turn as turns  # noqa: PLC0415 - as in cluster

    _finish(turns.run_queue_turn(nodes, requests, store, seed, _narrator()), as_json=as_json)


@app.command()
def quality(
    *,
    trace: Annotated[str, typer.Option(help="openb:NAME[,NAME], or a CSV file of pods (with --nodes).")],
    policies: Annotated[str, typer.Option(help="Who places; a comma list.")] = "tessera,fgd,bestfit",
    mix: Annotated[str, typer.Option(help="What is known of coming pods: oracle, or online = learned.")] = "online",
    seeds: Annotated[str, typer.Option(help="Seeds of arrivals, such as 42-51 or 1,7.")] = "42-44",
    nodes: Annotated[Path | None, typer.Option(help="CSV file of nodes, for a trace of one's own.")] = None,
    traces: Annotated[
        Path | None, typer.Option(envvar="TESSERA_TRACES", help="Folder of traces; a built-in stand-in without it.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write the curves as .svg or .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace under several placement policies and say how much of the GPUs each allocates."""
    from bench import quality as replays  # noqa: PLC0415 - as in cluster
    from bench.quality_plot import SUFFIXES, PlotError, plot  # noqa: PLC0415 - as in cluster
    from bench.trace import TraceError, load_all  # noqa: PLC0415 - as in cluster

    chosen = tuple(dict.fromkeys(policies.split(",")))
    if not set(chosen) <= set(replays.POLICIES):
        _refuse(f"--policies is a list of {','.join(replays.POLICIES)}; not {policies}.")
    if mix not in replays.MIXES:
        _refuse(f"--mix is oracle or online, not {mix}.")
    if picture is not None and picture.suffix not in SUFFIXES:
        _refuse(f"--plot writes {' or '.join(SUFFIXES)}; not {picture}.")
    try:
        loaded = load_all(trace, traces, nodes)
    except TraceError as error:
        _refuse(str(error))
    report = replays.run_quality(replays.Settings(loaded, chosen, mix, _seeds(seeds)), _narrator())
    if picture is not None and report["ok"]:
        try:
            plot(report, picture)
        except PlotError as error:
            report |= {"ok": False, "error": str(error)}
    if as_json or not report["ok"]:
        _finish(report, as_json=as_json)
    replays.show(report)
    _finish({key: value for key, value in report.items() if key not in {"rows", "sources", "fragments"}}, as_json=False)


@app.command()
def compare(
    *,
    one: Annotated[Path, typer.Argument(metavar="A", help="JSON report of `bench quality`.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same seeds.")],
    as_json: AsJson = False,
) -> None:
    """Say what the policies of A have allocated less than those of B, seed by seed."""
    from bench import compare as regrets  # noqa: PLC0415 - as in cluster

    try:
        report = regrets.compare(regrets.read_report(one), regrets.read_report(other))
    except regrets.CompareError as error:
        _refuse(str(error))
    if not as_json:
        regrets.show(report)
    _finish(report if as_json else {**report, "rows": len(report["rows"])}, as_json=as_json)


@app.command()
def check(
    *,
    everything: Annotated[bool, typer.Option("--all", help="Also those that need a real control plane.")] = False,
    only: Annotated[str, typer.Option(help="One bench of the budgets by name.")] = "",
    as_json: AsJson = False,
) -> None:
    """Run benches and hold their figures against bench/budgets.toml."""
    from bench import check as budgets  # noqa: PLC0415 - as in cluster

    known = budgets.read_budgets(budgets.BUDGETS.read_text())
    if only and only not in {budget.name for budget in known}:
        _refuse(f"--only is one of {', '.join(budget.name for budget in known)}; not {only}.")
    chosen = [budget for budget in known if budget.name == only or (not only and (budget.quick or everything))]
    _finish(budgets.check(chosen), as_json=as_json)


@app.command()
def audit(
    *,
    dump: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder written by --dump.")],
    as_json: AsJson = False,
) -> None:
    """Audit a dump of `bench cluster` once more."""
    from bench.auditor import audit as audit_dump  # noqa: PLC0415 - as in cluster

    try:
        report = audit_dump(dump)
    except (OSError, ValueError, LookupError, TypeError) as error:
        report = {"seed": None, "ok": False, "error": f"the dump cannot be read: {error!r}"}
    _finish(report, as_json=as_json)


def _kinds(written: str) -> tuple[str, ...]:
    """Return kinds of ask from a comma list."""
    from bench.workload import KINDS_OF_ASK  # noqa: PLC0415 - usage errors need no numpy

    kinds = tuple(dict.fromkeys(written.split(",")))
    if not set(kinds) <= set(KINDS_OF_ASK) or not set(kinds) & {"none", "whole"}:
        _refuse(f"--kinds is a list of {','.join(KINDS_OF_ASK)}, with none or whole among them; not {written}.")
    return kinds


def _seeds(written: str) -> tuple[int, ...]:
    """Return seeds from a list of numbers and ranges."""
    ranges = [part.split("-") for part in written.split(",")]
    if not all(len(ends) <= 2 and all(end.isdecimal() and len(end) < 10 for end in ends) for ends in ranges):
        _refuse(f"--seeds is a list such as 42-51 or 1,7; not {written}.")
    seeds = [seed for ends in ranges for seed in range(int(ends[0]), min(int(ends[-1]), int(ends[0]) + 1000) + 1)]
    if not seeds:
        _refuse(f"--seeds names none; not {written}.")
    return tuple(dict.fromkeys(seeds))


def _numbers(written: str, option: str, least: int) -> tuple[int, ...]:
    """Return whole numbers from a comma list, each once, in order."""
    try:
        numbers = tuple(sorted({int(one) for one in written.split(",")}))
    except ValueError:
        _refuse(f"{option} is a list of whole numbers such as 1,16; not {written}.")
    if numbers[0] < least:
        _refuse(f"{option} must be at least {least}; not {written}.")
    return numbers


def _run(
    work: Callable[[Say], Coroutine[object, object, Json]],
    *,
    seed: int | None,
    as_json: bool,
    show: Callable[[Json], None] | None = None,
    usage: type[Exception] | tuple[()] = (),
) -> NoReturn:
    """Run a bench to its report, or to the sentence that says why there is none, and finish.

    Args:
        work: takes what writes progress.
        seed: for the report of a bench that could not be finished.
        as_json: as for `_finish`.
        show: prints the bench's own table for people to stderr.
        usage: what it raises when it was asked for something that cannot be.
    """
    try:
        report = asyncio.run(work(_narrator()))
    except usage as error:
        _refuse(str(error))
    except BenchError as error:
        _finish({"seed": seed, "ok": False, "error": str(error)}, as_json=as_json)
    if show:
        show(report)
    _finish(report, as_json=as_json, shown=show is not None)


def _narrator() -> Say:
    """Return what writes progress to stderr, with the seconds since now."""
    console, begun = Console(stderr=True), time.monotonic()
    return lambda text: console.print(f"[dim]{time.monotonic() - begun:6.1f} s[/dim]  {text}", highlight=False)


def _refuse(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise typer.Exit(USAGE)


def _finish(report: Json, *, as_json: bool, shown: bool = False) -> NoReturn:
    """Print the report and end with its status.

    Args:
        report: with `ok`.
        as_json: as one object; else as a table.
        shown: people have seen a table of its own; the whole report is only for those who ask what is not ok.
    """
    if as_json:
        print(json.dumps(report))
    elif not (shown and report["ok"]):
        table = Table("key", "value")
        for key, value in report.items():
            table.add_row(key, json.dumps(value) if key != "released" else f"{len(value)} pods")
        Console().print(table)
    raise typer.Exit(0 if report["ok"] else FAILED)


def main() -> NoReturn:
    """Run the command line; a usage error ends with 64."""
    try:
        app(prog_name="python -m bench")
    except SystemExit as end:
        sys.exit(USAGE if end.code == _CLICK_USAGE else end.code)
    sys.exit(0)


if __name__ == "__main__":
    main()
