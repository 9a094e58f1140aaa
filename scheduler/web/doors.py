"""The door as the configuration wants it: which tokens are known, and where the keys of providers come from."""

from __future__ import annotations

import aiohttp

from scheduler import config
from scheduler.clock import Clock
from scheduler.errors import ConfigError
from scheduler.model.subject import Grant

from .access import Access, Bearers, Binding, Rate
from .bearer import KubernetesTokens, OidcTokens, Provider, Review
from .tokens import ApiToken, ApiTokens

KEYS_MAX = 1 << 20
_KEYS_S = aiohttp.ClientTimeout(total=5)
_OK = 200


def door_of(settings: config.Access, clock: Clock, review: Review | None, own: ApiToken | None = None) -> Access:
    """Return the door.

    Args:
        settings: who is known, and what they may do.
        clock: for expiry and rates.
        review: asks the API server about a token; None = there is none that could be asked.
        own: a token besides those of the file.

    Raises:
        ConfigError: Kubernetes' tokens are wanted where no API server is.
    """
    rate = Rate(clock, settings.callsPerSecond, settings.burst)
    bindings = tuple(
        Binding(
            Grant(one.role, frozenset(one.namespaces), frozenset(one.queues)),
            users=frozenset(one.users),
            groups=frozenset(one.groups),
        )
        for one in settings.bindings
    )
    bearers: list[Bearers] = []
    if settings.tokens is not None or own is not None:
        known = ApiTokens(settings.tokens, clock)
        if own is not None:
            known.admit(own)
        bearers.append(known)
    for one in settings.oidc:
        names = {"name": one.name, "issuer": one.issuer, "audience": one.audience, "keys_url": one.keys}
        claims = {"user": one.user, "groups": one.groups}
        provider = Provider(**names, **claims, algorithms=one.algorithms, leeway_s=int(one.leeway))
        bearers.append(OidcTokens(provider, fetch, bindings, clock))
    if settings.kubernetes is not None:
        if review is None:
            raise ConfigError("`access.kubernetes` needs an API server; an embedded cluster has API tokens alone")
        bearers.append(KubernetesTokens(review, settings.kubernetes.audiences, bindings, clock))
    return Access(tuple(bearers), rate)


async def fetch(url: str) -> bytes:
    """Return what is at a provider's URL: at most a MiB, within five seconds, no redirects followed. Raises OSError."""
    body = bytearray()
    try:
        async with (
            aiohttp.ClientSession(timeout=_KEYS_S, trust_env=True) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            async for part in answer.content.iter_any():
                body += part
                if len(body) > KEYS_MAX:
                    raise OSError(f"{url} has more than {KEYS_MAX} bytes")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OSError(f"{url}: {error or type(error).__name__}") from error
    if answer.status != _OK:
        raise OSError(f"{url} answered {answer.status}")
    return bytes(body)
