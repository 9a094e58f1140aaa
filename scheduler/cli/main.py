"""The command tree; what is dear to import is imported by the command that needs it."""

from __future__ import annotations

import gc
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from . import ledger, token
from .api import DEFAULT

app = typer.Typer(
    name="tessera", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="GPUs for pods."
)
app.add_typer(ledger.app)
app.add_typer(token.app)

Url = Annotated[str, typer.Option("--api", help="URL of Tessera's API.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def _version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        typer.echo(f"tessera {version('tessera-scheduler')}")
        raise typer.Exit


@app.callback()
def root(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Tessera places pods on GPUs."""


@app.command()
def serve(
    *,
    kubeconfig: Annotated[Path | None, typer.Option(help="Kubeconfig of the cluster.")] = None,
    in_cluster: Annotated[bool, typer.Option("--in-cluster", help="Use the pod's service account.")] = False,
    embedded: Annotated[Path | None, typer.Option(help="Folder with nodes.json and pods.json.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).")] = None,
    queues: Annotated[Path | None, typer.Option(help="Queues (YAML); counts instead of the cluster's.")] = None,
    db: Annotated[str, typer.Option(help="sqlite:///FILE or postgresql://HOST/NAME; default: a file.")] = "",
    extender: Annotated[str, typer.Option(help="HOST:PORT for kube-scheduler.")] = "127.0.0.1:8888",
    extender_tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain of that port (PEM).")] = None,
    extender_tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    extender_client_ca: Annotated[Path | None, typer.Option(help="CA of kube-scheduler's certificate.")] = None,
    api: Annotated[str, typer.Option(help="HOST:PORT for people; loopback without `access`.")] = "127.0.0.1:8080",
    webhook: Annotated[str, typer.Option(help="HOST:PORT for kube-apiserver's admission; none by default.")] = "",
    agents: Annotated[str, typer.Option(help="HOST:PORT for node agents; none by default.")] = "",
    agents_token: Annotated[Path | None, typer.Option(help="Write their token there; with --embedded.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate for webhook and agents (PEM); the webhook can make its own.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    metrics: Annotated[str, typer.Option(help="HOST:PORT for Prometheus and probes.")] = "127.0.0.1:9090",
    dev_token: Annotated[Path | None, typer.Option(help="Write an administrator's token there.")] = None,
) -> None:
    """Run Tessera beside a kube-scheduler; prints one JSON line when ready."""
    gc.disable()  # until ready: what a start makes stays, and looking through it again and again doubles its time
    from .serve import Options, run  # noqa: PLC0415 - keeps `tessera --help` fast

    run(
        Options(
            kubeconfig=kubeconfig,
            in_cluster=in_cluster,
            embedded=embedded,
            config=config,
            queues=queues,
            db=db,
            extender=extender,
            extender_tls_cert=extender_tls_cert,
            extender_tls_key=extender_tls_key,
            extender_client_ca=extender_client_ca,
            webhook=webhook,
            agents=agents,
            agents_token=agents_token,
            tls_cert=tls_cert,
            tls_key=tls_key,
            api=api,
            metrics=metrics,
            dev_token=dev_token,
        )
    )


@app.command()
def demo(
    *,
    headless: Annotated[bool, typer.Option("--headless", help="No picture; also without a terminal.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")] = False,
    seed: Annotated[int, typer.Option(help="What is drawn; the same seed gives the same journal.")] = 7,
    duration: Annotated[
        float | None,
        typer.Option(min=1.0, help="Virtual seconds when headless (600); seconds of the picture otherwise (20)."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=999, help="Nodes, with 8 GPUs each.")] = 64,
    keep: Annotated[bool, typer.Option("--keep", help="Go on after the script, until Ctrl-C.")] = False,
) -> None:
    """Watch Tessera fill a cluster in memory: no cluster, no GPU needed."""
    from .demo import Options, run  # noqa: PLC0415 - keeps `tessera --help` fast

    run(Options(headless=headless, json=json, seed=seed, duration_s=duration, nodes=nodes, keep=keep))


@app.command("nodes")
def list_nodes(*, api: Url = DEFAULT, json: AsJson = False) -> None:
    """List nodes with what is free of them."""
    from .nodes import nodes  # noqa: PLC0415 - keeps `tessera --help` fast

    nodes(api, as_json=json)


@app.command("gpus")
def list_gpus(*, api: Url = DEFAULT, json: AsJson = False) -> None:
    """List GPUs with their use and health."""
    from .nodes import gpus  # noqa: PLC0415 - keeps `tessera --help` fast

    gpus(api, as_json=json)


@app.command("queue")
def show_queue(
    name: Annotated[str, typer.Argument(help="Name of a queue; all of them without it.")] = "",
    *,
    api: Url = DEFAULT,
    json: AsJson = False,
) -> None:
    """List queues with what is used and who waits; of one queue also its line."""
    from .queues import queue  # noqa: PLC0415 - keeps `tessera --help` fast

    queue(name, api, as_json=json)


@app.command("quota")
def show_quota(*, api: Url = DEFAULT, json: AsJson = False) -> None:
    """Show the tree of queues: what each may use, uses, borrows and may still take, key by key."""
    from .queues import quota  # noqa: PLC0415 - keeps `tessera --help` fast

    quota(api, as_json=json)


@app.command("top")
def show_top(
    *,
    api: Url = DEFAULT,
    once: Annotated[bool, typer.Option("--once", help="Print once; also without a terminal.")] = False,
) -> None:
    """Show the cluster on one screen."""
    from .top import top  # noqa: PLC0415 - keeps `tessera --help` fast

    top(api, once=once)


@app.command("why")
def explain_pod(
    pod: Annotated[str, typer.Argument(help="Name of the pod.")],
    *,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "default",
    lang: Annotated[str, typer.Option(help="en or ko; default: as LC_ALL, LC_MESSAGES or LANG say.")] = "",
    api: Url = DEFAULT,
    json: AsJson = False,
) -> None:
    """Say why a pod waits; exit 0 = it runs, 2 = wait, 3 = change the pod, 4 = for an administrator, 1 = error."""
    from .why import why  # noqa: PLC0415 - keeps `tessera --help` fast

    why(pod, namespace, api, lang, as_json=json)


@app.command("release")
def let_go(
    pod: Annotated[str | None, typer.Argument(help="Name of the pod.")] = None,
    *,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Its namespace (default); with --all only this one.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every held pod.")] = False,
    kubeconfig: Annotated[Path | None, typer.Option(help="Kubeconfig; default: as kubectl.")] = None,
    json: AsJson = False,
) -> None:
    """Take the gate off held pods, without Tessera: for emergencies, and before Tessera is removed."""
    from .release import release  # noqa: PLC0415 - keeps `tessera --help` fast

    release(pod, namespace, kubeconfig, everything=everything, as_json=json)


@app.command("doctor")
def examine(
    *,
    kubeconfig: Annotated[Path | None, typer.Option(help="Kubeconfig; default: as kubectl.")] = None,
    in_cluster: Annotated[bool, typer.Option("--in-cluster", help="Use the pod's service account.")] = False,
    api: Url = DEFAULT,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Tessera's namespace.")] = "tessera-system",
    kube_scheduler_config: Annotated[
        Path | None, typer.Option(help="kube-scheduler's configuration file; default: the shipped ConfigMap.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Check everything around Tessera: rights, versions, clocks, kube-scheduler, nodes; exit 0 unless one fails."""
    from .doctor import Options, doctor  # noqa: PLC0415 - keeps `tessera --help` fast

    doctor(Options(kubeconfig, in_cluster, api, namespace, kube_scheduler_config), as_json=json)
