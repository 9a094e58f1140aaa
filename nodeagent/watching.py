"""The agent as a process: a look every few seconds, sooner when the driver tells something, and `/metrics`.

Two threads touch the driver, as it wants: one waits for its events, one makes all other calls.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from typing import Protocol

import orjson

from nodeagent.agent import Agent
from nodeagent.exporter import STALE_S, Exporter
from nodeagent.nvml import GONE_EVENT, LAYOUT_EVENT, RECOVERY_EVENT, Absent, Event, Events, Why
from nodeagent.report import Report

DEEP_S = 60.0  # what changes seldom is read again after so long, and when an event says that it changed
_WAIT_MS = 1000
_SPACING_S = 1.0
_MISSED = 4  # intervals without a look, after which something hangs
_AFTER_FAILURE_S = 5.0
_HEARD_MAX = 1024
_URGENT = LAYOUT_EVENT | GONE_EVENT | RECOVERY_EVENT


class Listener:
    """Waits for the driver's events in a thread of its own."""

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.heard: queue.Queue[Event] = queue.Queue(_HEARD_MAX)
        self.wake = threading.Event()
        self._uuids: tuple[str, ...] = ()
        self._events: Events | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def follow(self, agent: Agent) -> None:
        """Listen to the GPUs that answer; anew when they are others than before."""
        uuids = tuple(gpu.uuid for gpu in agent.gpus)
        if uuids == self._uuids and self._thread is not None and self._thread.is_alive():
            return
        self.close()
        self._uuids, self._ended = uuids, threading.Event()
        if uuids:
            self._events = Events(agent.gpus)
            self._thread = threading.Thread(target=self._listen, args=(self._events, self._ended), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._events is not None:
            self._events.close()
        self._thread = self._events = None

    def _listen(self, events: Events, ended: threading.Event) -> None:
        while not ended.is_set():
            found = events.wait(_WAIT_MS)
            if not isinstance(found, Absent):
                try:
                    self.heard.put_nowait(found)
                except queue.Full:  # a storm; what it says is known by now
                    continue
                self.wake.set()
            elif found.why is Why.STALE:
                return  # the driver was loaded anew; the next look finds out and has us follow again
            elif found.why is not Why.NOTHING:  # a lost GPU makes every wait fail at once
                self.wake.set()
                ended.wait(_AFTER_FAILURE_S)


class Taker(Protocol):
    """Who is told of each report."""

    def publish(self, report: Report) -> None:
        """Take it; returns at once."""
        ...


def watch(
    agent: Agent,
    stop: threading.Event,
    *,
    address: tuple[str, int],
    interval_s: float,
    dcgm: bool,
    uplink: Taker | None = None,
) -> int:
    """Run until `stop`, or until the driver was changed below us: then only a new process can use it.

    Returns:
        the exit status. Raises OSError when the port is taken.
    """
    stale_s = max(STALE_S, _MISSED * interval_s)
    exporter = Exporter(*address, monotonic=time.monotonic, dcgm=dcgm, stale_s=stale_s)
    listener = Listener()
    ready = {
        "ready": True,
        "pid": os.getpid(),
        "metrics": f"http://{address[0] or '127.0.0.1'}:{exporter.port}/metrics",
    }
    sys.stdout.write(orjson.dumps(ready).decode() + "\n")
    sys.stdout.flush()
    said: tuple[str, ...] = ()
    deep_s = 0.0
    try:
        while not stop.is_set():
            deep = time.monotonic() >= deep_s
            while not listener.heard.empty():
                event = listener.heard.get_nowait()
                agent.hear(event)
                deep = deep or bool(event.kind & _URGENT)
            if deep:
                deep_s = time.monotonic() + DEEP_S
            report = agent.look(deep=deep)
            listener.follow(agent)
            exporter.publish(report)
            if uplink is not None:
                uplink.publish(report)
            said = _tell(report, said)
            if report.problem and Why.MISMATCH.text in report.problem:
                return 1
            _pause(stop, listener.wake, interval_s)
    finally:
        listener.close()
        exporter.close()
    return 0


def _pause(stop: threading.Event, wake: threading.Event, seconds: float) -> None:
    """Wait for the next look; an event of the driver brings it forward, a storm of them not beyond one each second."""
    stop.wait(min(_SPACING_S, seconds))
    until = time.monotonic() + seconds - _SPACING_S
    while not stop.is_set() and (left := until - time.monotonic()) > 0:
        if wake.wait(min(left, 0.5)):
            break
    wake.clear()


def _tell(report: Report, said: tuple[str, ...]) -> tuple[str, ...]:
    """Write what is wrong to stderr, once while it lasts."""
    now = (
        *([report.problem] if report.problem else ()),
        *report.notes,
        *(f"GPU {one.index}: {one.why}" for one in report.lost),
    )
    for text in now:
        if text not in said:
            sys.stderr.write(f"tessera-agent: {text}\n")
    return now
