"""Whose token is it? Kubernetes' own answer, a TokenReview."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

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
    spec = {"token": token, **({"audiences": list(audiences)} if audiences else {})}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    answer, _ = await server.ask(PATH, body)
    status = answer.get("status") or {}
    user = status.get("user") or {}
    name = user.get("username")
    if status.get("authenticated") is not True or not isinstance(name, str) or not name:
        return None
    # An authenticator that knows nothing of audiences leaves them out: then the token is for the API server alone.
    if audiences and not set(audiences) & set(status.get("audiences") or ()):
        return None
    return name, tuple(one for one in user.get("groups") or () if isinstance(one, str))


def reviewer(server: Cluster) -> Callable[[str, Sequence[str]], Awaitable[tuple[str, tuple[str, ...]] | None]]:
    """Return what asks this API server about tokens. Raises ConfigError where it is no real one."""
    if not isinstance(server, ApiServer):
        raise ConfigError("tokens of Kubernetes need an API server")
    return partial(review, server)
