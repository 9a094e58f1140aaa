"""Decisions as people and the journal read them.

Invariant: a decision record fits in 2,048 bytes of UTF-8 and holds integers only, whatever the nodes are called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import orjson

from scheduler.model.pod import Refusal

from .board import Board
from .catalog import REASONS as WORDS
from .combine import Rows
from .pipeline import Failed, Verdict
from .reasons import OF_REQUEST, REASONS

RECORD_BYTES_MAX = 2048
NAME_BYTES_MAX = 256  # as JSON writes it; a Kubernetes name has at most 253
_PLAIN = re.compile(r"[a-z0-9.-]*")  # what JSON writes as it is


class Left(TypedDict):
    """How many nodes are left after a mask."""

    mask: str
    nodes: int


Cause = TypedDict("Cause", {"code": str, "class": str, "text": str, "text_ko": str})
"""One reason as people get it; `class` is wait, change or admin."""


class Why(TypedDict):
    """What the masks left, and why the request waits."""

    funnel: list[Left]
    reasons: list[Cause]


def record(board: Board, chosen: int, names: Sequence[str], generation: int, *, rows: Rows | None = None) -> str:
    """Write the decision record: funnel, chosen node and runner-up with their scores by tier, generation.

    Args:
        board: of the ask, turned to the columns in which it was decided.
        chosen: row of the chosen node.
        names: node name per row.
        generation: of the inventory.
        rows: the nodes that were offered; None = all. They make the funnel, and the runner-up is the best of them
            that was not chosen.

    Returns:
        Compact JSON with sorted keys, at most 2,048 bytes; scores in millionths. No runner-up: null.
    """
    failed = board.settle(None if rows is None else np.append(rows, chosen))
    others = [row for row in board.best(rows, 2).tolist() if row != chosen]
    told = [{"node": _short(names[row]), "scores": _scores(board, row)} for row in (chosen, *others[:1])]
    text = orjson.dumps(
        {
            "v": 1,
            "generation": generation,
            "funnel": funnel(failed, rows),
            "chosen": told[0],
            "runner_up": told[1] if len(told) > 1 else None,
        },
        option=orjson.OPT_SORT_KEYS,
    )
    assert len(text) <= RECORD_BYTES_MAX, "policy names too long for a decision record"
    return text.decode()


def funnel(failed: Failed, rows: Rows | None = None) -> list[tuple[str, int]]:
    """Return after each mask how many of these nodes are left; None = of all."""
    first = failed.first if rows is None else failed.first[rows]
    lost = np.bincount(first + 1, minlength=len(failed.masks) + 1)[1:]  # 0 stands for those that pass
    return list(zip(failed.masks, (len(first) - np.cumsum(lost)).tolist(), strict=True))


def why(verdict: Verdict, profiles: Sequence[str] = ()) -> Why:
    """Explain a verdict: nodes left after each mask, and the reasons.

    The first reason speaks for the whole request and its class says who must act; those of single nodes follow, first
    of the nodes where the request got furthest. Where a node passes, the request only waits for its turn.

    Args:
        verdict: what was found.
        profiles: legal names nearest to the MIG profile asked; told where no node has that.
    """
    words = ["PendingEvaluation"]
    failed = verdict.failed
    if headline := failed.headline():
        furthest = sorted(set(failed.first.tolist()), reverse=True)
        words = [OF_REQUEST.get(headline, headline), *(WORDS[failed.masks[index]] for index in furthest)]
    causes = [cause(word) for word in dict.fromkeys(words)]
    if profiles and words[0] == "NoSuchMigProfile":
        listed = ", ".join(profiles)
        causes[0]["text"] += f" Nearest names: {listed}."
        causes[0]["text_ko"] += f" 가장 가까운 이름: {listed}."
    return {"funnel": [{"mask": mask, "nodes": nodes} for mask, nodes in funnel(failed)], "reasons": causes}


def why_refused(refusal: Refusal) -> Why:
    """Explain a pod that can never be placed as it is written: its own sentence, and what the word means."""
    return {"funnel": [], "reasons": [{**cause(refusal.reason), "text": refusal.text}]}


def cause(word: str) -> Cause:
    """Return a word of the vocabulary with its class and sentences.

    Raises:
        KeyError: the vocabulary has no such word.
    """
    reason = REASONS[word]
    return {"code": word, "class": reason.who, "text": reason.text, "text_ko": reason.text_ko}


def _scores(board: Board, row: int) -> list[dict[str, int]]:
    """Return a node's tier sums in millionths, each under the names of its tier's scores."""
    return [{name: round(one * 1_000_000)} for name, one in zip(board.tiers, board.sums(row), strict=True)]


def _short(name: str) -> str:
    """Cut a name so that JSON writes it in at most 256 bytes; what UTF-8 cannot write becomes a question mark."""
    if len(name) < NAME_BYTES_MAX - 1 and _PLAIN.fullmatch(name):
        return name
    name = name.encode("utf-8", "replace").decode()[:NAME_BYTES_MAX]
    while len(json.dumps(name, ensure_ascii=False).encode()) > NAME_BYTES_MAX:
        name = name[:-1]
    return name
