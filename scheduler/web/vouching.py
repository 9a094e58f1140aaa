"""Who may report for a node: the agent's pod on it, by its projected token; without a cluster, a developer's token.

Invariant: that a token is good, whose it is and on which node its pod runs is the API server's word. Any pod can have a
token with the agent's audience made for itself, so the account counts too.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from nodeagent.messages import AUDIENCE

from .agents import Caller, Vouch
from .bearer import unverified

ACCOUNT = "tessera-agent"
LIFE_MAX_S = 3660
"""An hour, and a minute for API servers that round up."""

_EXTRA = "authentication.kubernetes.io/"

ReviewExtra: TypeAlias = Callable[[str, Sequence[str]], Awaitable[tuple[str, Mapping[str, tuple[str, ...]]] | None]]
"""Token and audiences -> user name and extra facts; None = the API server does not know it. Raises TesseraError."""


def by_kubernetes(review: ReviewExtra, namespace: str) -> Vouch:
    """Return what knows agents by tokens that are bound to their pods; `namespace` is that of Tessera's agent."""
    account = f"system:serviceaccount:{namespace}:{ACCOUNT}"

    async def vouch(token: str) -> Caller | None:
        told = await review(token, (AUDIENCE,))
        if told is None or told[0] != account:
            return None
        node, uid, pod = (_one(told[1], f"{_EXTRA}{key}") for key in ("node-name", "node-uid", "pod-uid"))
        made_s, until_s = (unverified(token)[1].get(key) for key in ("iat", "exp"))  # the API server has verified it
        if not node or not pod or not isinstance(made_s, int) or not isinstance(until_s, int):
            return None
        return Caller(node, uid, pod, until_s * 1_000_000) if 0 < until_s - made_s <= LIFE_MAX_S else None

    return vouch


def by_token(known: str) -> Vouch:
    """Return what lets whoever shows this token report for any node: for a cluster in memory."""

    async def vouch(token: str) -> Caller | None:
        return Caller() if hmac.compare_digest(token.encode(), known.encode()) else None

    return vouch


def _one(extra: Mapping[str, tuple[str, ...]], key: str) -> str:
    """Return the only value of an extra fact, empty where there is none or more than one."""
    told = extra.get(key, ())
    return told[0] if len(told) == 1 else ""
