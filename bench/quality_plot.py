"""The picture of a quality report: allocated GPUs over arrived GPUs, one panel per trace, one line per policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Json = dict[str, Any]
FIRST = {"tessera": "#c0392b", "fgd": "#2471a3", "bestfit": "#1e8449"}
SUFFIXES = (".svg", ".png")


class PlotError(Exception):
    """There is no picture; the sentence says why."""


def plot(report: Json, path: Path) -> None:
    """Draw the rows of a report.

    Args:
        report: of `bench quality`.
        path: to write; `.svg` or `.png`.

    Raises:
        PlotError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install 'tessera-scheduler[plot]'") from error
    traces = list(dict.fromkeys(row["trace"] for row in report["rows"]))
    figure = Figure(figsize=(5 * len(traces), 4), layout="constrained")
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    for trace, panel in zip(traces, panels, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in report["rows"]):
            rows = [row for row in report["rows"] if (row["trace"], row["policy"]) == (trace, policy)]
            arrived, means = [row["arrived"] for row in rows], [row["mean"] for row in rows]
            width = 2.2 if policy == "tessera" else 1.1
            panel.plot(arrived, means, label=policy, color=FIRST.get(policy), linewidth=width, marker=".")
        panel.set_xlim(75, 131)
        panel.set_ylim(70, 100)
        panel.grid(alpha=0.3)
        panel.set_title(trace)
        panel.set_xlabel("GPUs asked for so far, % of the cluster")
        panel.set_ylabel("GPUs allocated, % of the cluster")
    panels[0].legend(loc="lower right", fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}") from error
