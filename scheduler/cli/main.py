"""The command tree. Each command lives in a module of its own and is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tessera", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="GPUs for pods."
)


@app.callback()
def root() -> None:
    """Tessera places pods on GPUs."""


@app.command()
def serve(
    *,
    kubeconfig: Annotated[Path | None, typer.Option(help="Kubeconfig of the cluster.")] = None,
    in_cluster: Annotated[bool, typer.Option("--in-cluster", help="Use the pod's service account.")] = False,
    embedded: Annotated[Path | None, typer.Option(help="Folder with nodes.json and pods.json.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).")] = None,
    db: Annotated[str, typer.Option(help="Database URL; default: SQLite in the state folder.")] = "",
    extender: Annotated[str, typer.Option(help="HOST:PORT for kube-scheduler.")] = "127.0.0.1:8888",
    api: Annotated[str, typer.Option(help="HOST:PORT for people; loopback.")] = "127.0.0.1:8080",
    metrics: Annotated[str, typer.Option(help="HOST:PORT for Prometheus and probes.")] = "127.0.0.1:9090",
) -> None:
    """Run Tessera beside a kube-scheduler; prints one JSON line when ready."""
    from .serve import Options, run  # noqa: PLC0415 - keeps `tessera --help` fast

    run(
        Options(
            kubeconfig=kubeconfig,
            in_cluster=in_cluster,
            embedded=embedded,
            config=config,
            db=db,
            extender=extender,
            api=api,
            metrics=metrics,
        )
    )
