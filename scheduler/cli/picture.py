"""The live picture of a demo: every GPU a cell, who waits and why, and what was just decided.

Drawn from the same live state that the API shows; nothing here changes anything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from policies.columns import Health, Mode, Use
from scheduler import GPU
from scheduler.app import App
from scheduler.decision import explain
from scheduler.inventory.registry import Source
from scheduler.ledger.lifecycle import TERMINAL
from scheduler.model.pod import Pod

from .chronicle import Chronicle

FREE, USED, RESERVED, BROKEN = "free", "used", "reserved", "unhealthy"
STYLES = {FREE: "bright_black", USED: "cyan", RESERVED: "bold yellow", BROKEN: "bold red"}
GLYPHS = {FREE: "·", USED: "■", RESERVED: "▣", BROKEN: "×"}  # noqa: RUF001 - a cross is meant
PLAIN_GLYPHS = {FREE: ".", USED: "#", RESERVED: "o", BROKEN: "x"}
WINDOW_S = 60.0
CELL_COLUMNS = 13  # three digits, a space, eight cells, a space
LOWER_ROWS_MIN = 5
BAR, NARROW_BAR = 16, 8
NARROW = 100  # columns; below it the second figures go
SPACED_ROWS = 5  # of a list; below it no blank line before it
DECISION = 57  # columns of one decision


@dataclass(slots=True)
class Picture:
    """Draws one running Tessera.

    Attributes:
        pools: title and node names of each part of the grid.
        over: findings of the cluster's own audit so far.
        note: what happened last beside the usual.
    """

    app: App
    chronicle: Chronicle
    console: Console
    pools: Sequence[tuple[str, Sequence[str]]]
    over: int = 0
    note: str = ""
    _past: deque[tuple[float, int, int, int]] = field(default_factory=deque)

    def frame(self) -> RenderableType:
        """Return what to show now, cut to the terminal's size."""
        width, height = self.console.size
        grid = self._grid(width)
        upper = [self._title(), *self._tiles(width), *grid, self._legend()]
        rows = max(height - len(upper), LOWER_ROWS_MIN)
        return Group(*upper, self._lower(width, rows))

    # rows

    def _title(self) -> Text:
        at = datetime.fromtimestamp(self.app.clock.wall_us() // 1_000_000, UTC)
        line = Text(no_wrap=True, overflow="crop")
        line.append(" Tessera ", "bold reverse")
        line.append(f"  {at:%H:%M:%S}  {self.app.unready() or 'ready'}", "bold")
        line.append(f"  {self.note}", "yellow")
        return line

    def _tiles(self, width: int) -> tuple[Text, Text]:
        now_s, seen = self.app.clock.monotonic(), self.chronicle
        ended = seen.events["finish"] + seen.events["fail"]
        self._past.append((now_s, seen.events["submit"], len(seen.bound), ended))
        while now_s - self._past[0][0] > WINDOW_S:
            self._past.popleft()
        then_s, *before = self._past[0]
        minutes = max(now_s - then_s, 1.0) / 60
        rates = [round((new - old) / minutes) for new, old in zip(self._past[-1][1:], before, strict=True)]
        cells = Counter(cell for _, names in self.pools for name in names for cell in self.cells(name))
        total = max(sum(cells.values()), 1)
        share = (cells[USED] + cells[RESERVED]) / total
        bar = "━" if self._pretty() else "="
        first = Text(no_wrap=True, overflow="crop")
        first.append(f" {share:4.0%} ", "bold cyan")
        long = BAR if width >= NARROW else NARROW_BAR
        first.append(bar * round(long * share), "cyan").append(bar * (long - round(long * share)), "bright_black")
        first.append(f"  {cells[USED] + cells[RESERVED]} of {total} GPUs allocated")
        second = Text(no_wrap=True, overflow="crop")
        second.append(f" {len(seen.bound)} bound, mean wait {seen.mean_wait_s():.1f} s", "bold")
        second.append(f"   per minute: {rates[0]} arrive, {rates[1]} bound, {rates[2]} end")
        first.append(f"   over-allocations {self.over}", "green" if not self.over else "bold red")
        first.append(f"   {cells[BROKEN]} out of order" if cells[BROKEN] else "", "bold red")
        second.append(f"   journal {seen.lines} rows" if width >= NARROW else "", "bright_black")
        return first, second

    def _grid(self, width: int) -> list[Text]:
        per_row = max(width // CELL_COLUMNS, 1)
        rows: list[Text] = []
        for title, names in self.pools:
            rows.append(Text(f" {title}", "bold", no_wrap=True, overflow="crop"))
            for start in range(0, len(names), per_row):
                row = Text(no_wrap=True, overflow="crop")
                for name in names[start : start + per_row]:
                    row.append(f"{name[-3:]} ", "bright_black")
                    for cell in self.cells(name):
                        row.append(self._glyphs()[cell], STYLES[cell])
                    row.append(" ")
                rows.append(row)
        return rows

    def _legend(self) -> Text:
        line = Text(" a cell per GPU:", "bright_black", no_wrap=True, overflow="crop")
        for cell, glyph in self._glyphs().items():
            line.append(f"  {glyph} ", STYLES[cell]).append(cell, "bright_black")
        line.append("   Ctrl-C ends", "bright_black")
        return line

    def _lower(self, width: int, rows: int) -> RenderableType:
        """Show who waits beside what was decided, or above it where the terminal is narrow."""
        if width < 2 * 60:
            waiting = self._waiting(rows // 2)
            return Group(waiting, self._decided(rows - waiting.plain.count("\n") - 1))
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(ratio=1)
        table.add_column(width=DECISION)
        table.add_row(self._waiting(rows), self._decided(rows))
        return table

    def _waiting(self, rows: int) -> Text:
        pods = self.waiting()
        text, left = _headed(f"{len(pods)} waiting", rows)
        for pod in pods[:left]:
            text.append(f"\n {pod.request.name:<14}", "default not bold")
            text.append(f"{_asked(pod):<9}", "cyan not bold")
            text.append(f" {self.reason(pod)}", "bright_black not bold")
        return text

    def _decided(self, rows: int) -> Text:
        text, left = _headed("last decisions: best of how many nodes, runner-up", rows)
        for made in list(self.chronicle.decisions)[:left]:
            at = datetime.fromtimestamp(made.at_us // 1_000_000, UTC)
            text.append(f"\n {at:%H:%M:%S} ", "bright_black not bold")
            text.append(f"{made.pod.rpartition('/')[2]:<14}", "default not bold")
            text.append(f"{f'{made.gpus} GPU' if made.gpus else 'CPU only':<9}", "cyan not bold")
            text.append(f"{made.node} ", "bold")
            rest = f"of {made.nodes[1]}, {made.runner_up}" if made.runner_up else "the only one"
            text.append(rest, "bright_black not bold")
        return text

    # what it shows

    def waiting(self) -> list[Pod]:
        """Return Tessera's pods that are not bound, highest priority first, then oldest."""
        rows = self.app.desk.book.rows
        found = [
            pod
            for pod in self.app.desk.registry.pods.values()
            if pod.ours and not (pod.node or pod.terminal or pod.deleting or pod.gates)
            if (row := rows.get(pod.uid)) is None or row.state not in TERMINAL
        ]
        return sorted(found, key=lambda pod: (-pod.request.priority, pod.request.arrival_us, pod.request.name))

    def reason(self, pod: Pod) -> str:
        """Return why a pod waits, in half a sentence."""
        if pod.request.refusal is not None:
            return pod.request.refusal.text
        return explain.why(self.app.desk.fits(pod))["reasons"][0]["text"].partition(":")[0]

    def cells(self, name: str) -> list[str]:
        """Return the state of each GPU of a node; on observed nodes the used ones come first."""
        registry = self.app.desk.registry
        node = registry.nodes.get(name)
        if node is None:
            return [BROKEN] * 8
        slots, row, snapshot = len(node.devices), registry.columns.rows[name], registry.snapshot()
        if any(taint.effect == "NoExecute" for taint in node.taints):
            return [BROKEN] * slots
        holders = registry.holders(name)
        loose = holders.keys() - {uid for uid, _ in registry.said(Source.OBSERVED)}
        if node.mode is not Mode.EXACT:
            counts = {uid: sum(n for token, n in held.tokens if token == GPU) for uid, held in holders.items()}
            reserved = sum(counts[uid] for uid in loose)
            used = sum(counts.values()) - reserved
            return ([USED] * used + [RESERVED] * reserved + [FREE] * slots)[:slots]
        promised = {slot for uid in loose for slot, _ in holders[uid].devices}
        taken = np.flatnonzero(snapshot.use[:slots, row] != Use.FREE).tolist()
        sick = set(np.flatnonzero(snapshot.health[:slots, row] != Health.HEALTHY).tolist())
        state = dict.fromkeys(taken, USED) | dict.fromkeys(promised, RESERVED) | dict.fromkeys(sick, BROKEN)
        return [state.get(slot, FREE) for slot in range(slots)]

    def _pretty(self) -> bool:
        return self.console.encoding.lower().startswith("utf")

    def _glyphs(self) -> dict[str, str]:
        return GLYPHS if self._pretty() else PLAIN_GLYPHS


def _headed(title: str, rows: int) -> tuple[Text, int]:
    """Return a text of one headline and how many more lines it may have of so many rows."""
    blank = rows >= SPACED_ROWS
    text = Text(f"{chr(10) * blank} {title}", "bold", no_wrap=True, overflow="crop")
    return text, max(rows - 1 - blank, 0)


def _asked(pod: Pod) -> str:
    devices = pod.request.devices
    if not devices.count:
        return "CPU only"
    return f"{devices.count} {','.join(devices.models).upper() or 'GPU'}"
