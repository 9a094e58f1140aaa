"""Decisions as people and the journal read them.

Invariant: a decision record fits in 2,048 bytes of UTF-8 and holds integers only, whatever the nodes are called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from policies.columns import FloatArray
from scheduler.model.pod import Refusal

from .catalog import REASONS as WORDS
from .catalog import Policies
from .combine import Rows
from .pipeline import Verdict
from .reasons import OF_REQUEST, REASONS
from .shortlist import best_row, scores_of

RECORD_BYTES_MAX = 2048
NAME_BYTES_MAX = 256  # as JSON writes it; a Kubernetes name has at most 253


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


def record(verdict: Verdict, chosen: int, names: Sequence[str], generation: int, *, rows: Rows | None = None) -> str:
    """Write the decision record: funnel, chosen node and runner-up with their scores by tier, generation.

    Args:
        verdict: what was decided, before the columns change.
        chosen: row of the chosen node.
        names: node name per row.
        generation: of the inventory.
        rows: the nodes that were offered; None = all. The runner-up is the best of the others that pass.

    Returns:
        Compact JSON with sorted keys, at most 2,048 bytes; scores in millionths. No runner-up: null.
    """
    others = np.flatnonzero(verdict.passes) if rows is None else rows[verdict.passes[rows]]
    snapshot, ask, mix, policies = verdict.snapshot, verdict.ask, verdict.mix, verdict.policies
    both = [chosen, *best_row(snapshot, others[others != chosen], ask, mix, policies).tolist()]
    names_of_scores = [name for tier in policies.tiers for name, _ in tier]
    scores = scores_of(snapshot, np.asarray(both, np.intp), ask, mix, names_of_scores)
    told = [_candidate(policies, scores, place, names[row]) for place, row in enumerate(both)]
    text = json.dumps(
        {
            "v": 1,
            "generation": generation,
            "funnel": funnel(verdict),
            "chosen": told[0],
            "runner_up": told[1] if len(told) > 1 else None,
        },
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    )
    assert len(text.encode()) <= RECORD_BYTES_MAX, "policy names too long for a decision record"
    return text


def funnel(verdict: Verdict) -> list[tuple[str, int]]:
    """Return after each mask how many nodes are left."""
    failed = verdict.failed
    lost = np.bincount(failed[failed >= 0], minlength=len(verdict.masks))
    return list(zip(verdict.masks, (len(failed) - np.cumsum(lost)).tolist(), strict=True))


def why(verdict: Verdict, profiles: Sequence[str] = ()) -> Why:
    """Explain a verdict: nodes left after each mask, and the reasons.

    The first reason speaks for the whole request and its class says who must act; those of single nodes follow, first
    of the nodes where the request got furthest. Where a node passes, the request only waits for its turn.

    Args:
        verdict: what was found.
        profiles: legal names nearest to the MIG profile asked; told where no node has that.
    """
    words = ["PendingEvaluation"]
    if headline := verdict.headline():
        failed = sorted(set(verdict.failed.tolist()), reverse=True)
        words = [OF_REQUEST.get(headline, headline), *(WORDS[verdict.masks[index]] for index in failed)]
    causes = [cause(word) for word in dict.fromkeys(words)]
    if profiles and words[0] == "NoSuchMigProfile":
        listed = ", ".join(profiles)
        causes[0]["text"] += f" Nearest names: {listed}."
        causes[0]["text_ko"] += f" 가장 가까운 이름: {listed}."
    return {"funnel": [{"mask": mask, "nodes": nodes} for mask, nodes in funnel(verdict)], "reasons": causes}


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


def _candidate(policies: Policies, scores: Mapping[str, FloatArray], place: int, name: str) -> dict[str, object]:
    """Return a node's name and its scores in millionths, by tier and policy name."""
    by_tier = [{one: round(float(scores[one][place]) * 1_000_000) for one, _ in tier} for tier in policies.tiers]
    return {"node": _short(name), "scores": by_tier}


def _short(name: str) -> str:
    """Cut a name so that JSON writes it in at most 256 bytes; what UTF-8 cannot write becomes a question mark."""
    name = name.encode("utf-8", "replace").decode()[:NAME_BYTES_MAX]
    while len(json.dumps(name, ensure_ascii=False).encode()) > NAME_BYTES_MAX:
        name = name[:-1]
    return name
