"""Whose token is it? Kubernetes' own answer, a TokenReview."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from scheduler.errors import ConfigError

from .api import ApiServer
from .port import Cluster

PATH = "/apis/authentication.k8s.io/v1/tokenreviews"


async def review(server: ApiServer, token: str, audiences: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """Return user name and groups of a token's holder; None = the API server does not vouch for it.

    Args:
        server: whom to ask; its account needs the right to create tokenreviews.
        token: as it was shown.
        audiences: for one of which the token must have been made; none = for the API server itself.

    Raises:
        ApiError: the API server refused or did not answer.
    """
    user = await _reviewed(server, token, audiences)
    if user is None:
        return None
    return str(user["username"]), tuple(one for one in user.get("groups") or () if isinstance(one, str))


async def review_extra(
    server: ApiServer, token: str, audiences: Sequence[str]
) -> tuple[str, Mapping[str, tuple[str, ...]]] | None:
    """Return user name and the other facts that the API server tells of a token's holder; otherwise as `review`."""
    user = await _reviewed(server, token, audiences)
    if user is None:
        return None
    extra = {key: tuple(map(str, told)) for key, told in (user.get("extra") or {}).items() if isinstance(told, list)}
    return str(user["username"]), extra


async def _reviewed(server: ApiServer, token: str, audiences: Sequence[str]) -> Mapping[str, Any] | None:
    spec = {"token": token, **({"audiences": list(audiences)} if audiences else {})}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    answer, _ = await server.ask(PATH, body)
    status = answer.get("status") or {}
    user: Mapping[str, Any] = status.get("user") or {}
    name = user.get("username")
    if status.get("authenticated") is not True or not isinstance(name, str) or not name:
        return None
    # An authenticator that knows nothing of audiences leaves them out: then the token is for the API server alone.
    if audiences and not set(audiences) & set(status.get("audiences") or ()):
        return None
    return user


def reviewer(server: Cluster) -> Callable[[str, Sequence[str]], Awaitable[tuple[str, tuple[str, ...]] | None]]:
    """Return what asks this API server about tokens. Raises ConfigError where it is no real one."""
    return partial(review, _real(server))


def extra_reviewer(
    server: Cluster,
) -> Callable[[str, Sequence[str]], Awaitable[tuple[str, Mapping[str, tuple[str, ...]]] | None]]:
    """Return what asks this API server about pods' tokens. Raises ConfigError where it is no real one."""
    return partial(review_extra, _real(server))


def _real(server: Cluster) -> ApiServer:
    if not isinstance(server, ApiServer):
        raise ConfigError("tokens of Kubernetes need an API server")
    return server
