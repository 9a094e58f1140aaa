"""People known by tokens of others: Kubernetes' (TokenReview) and those of OpenID Connect providers.

Invariant: nothing that a token says of itself chooses how it is checked: algorithms, issuer, audience and keys are the
configuration's. What was learned of a token is kept by its hash, bounded, and for a short time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson
import structlog
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, RSAKey

from scheduler.clock import Clock
from scheduler.errors import TesseraError
from scheduler.model.subject import Subject

from .access import Binding, Rate, bound

log = structlog.get_logger(__name__)

Review: TypeAlias = Callable[[str, Sequence[str]], Awaitable[tuple[str, tuple[str, ...]] | None]]
"""Token and audiences -> user name and groups; None = the API server does not know it. Raises TesseraError."""
Fetch: TypeAlias = Callable[[str], Awaitable[bytes]]
"""URL -> body. Raises OSError or TesseraError."""

KNOWN_MAX = 4096
KNOWN_S, UNKNOWN_S = 60.0, 10.0
REVIEWS_PER_S, REVIEWS_BURST, REVIEWS_AT_ONCE = 50.0, 100.0, 8
"""Of tokens that are not known: whoever makes them up shall not take the API server's time, and Tessera's own calls to
it, from everybody else."""
KEYS_S, KEYS_AGAIN_S = 3600.0, 60.0
LEEWAY_MAX_S = 60
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")


class CrowdedError(TesseraError):
    """More unknown tokens are shown than the API server is asked about; try again."""

    code = "access.unavailable"


@dataclass(slots=True)
class KubernetesTokens:
    """Knows users and service accounts, whom the API server vouches for."""

    review: Review
    audiences: tuple[str, ...]
    bindings: tuple[Binding, ...]
    clock: Clock
    _strangers: Rate = field(init=False)
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REVIEWS_AT_ONCE))
    _known: OrderedDict[bytes, tuple[float, Subject | None]] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        """Begin with a full burst."""
        self._strangers = Rate(self.clock, REVIEWS_PER_S, REVIEWS_BURST)

    async def subject(self, token: str) -> Subject | None:
        """Return who shows this token; asks the API server at most once a minute about each.

        Raises:
            CrowdedError: too many unknown tokens are shown; who was known a minute ago is asked about all the same.
            TesseraError: the API server did not answer.
        """
        key = hashlib.sha256(token.encode()).digest()
        until_s, subject = self._known.get(key, (0.0, None))
        if self.clock.monotonic() < until_s:
            return subject
        if subject is None and self._strangers.wait_s("") > 0:
            raise CrowdedError("too many unknown tokens are shown")
        async with self._turns:
            until_s, subject = self._known.get(key, (0.0, None))  # the one before may have asked about the same
            now_s = self.clock.monotonic()
            if now_s < until_s:
                return subject
            told = await self.review(token, self.audiences)
        subject = None if told is None else bound("kubernetes", told[0], told[1], self.bindings)
        self._known[key] = (now_s + (KNOWN_S if subject else UNKNOWN_S), subject)
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return subject


@dataclass(frozen=True, slots=True)
class Provider:
    """One OpenID Connect provider, as configured.

    Attributes:
        name: prefix of its users and groups, so that two providers' people are never one.
        issuer: exactly as `iss` has it.
        audience: one that `aud` must have.
        keys_url: where its JWKS is.
        algorithms: those that are accepted, whatever a token's header says; never symmetric ones.
        user: name of the claim that names the user.
        groups: name of the claim that lists groups.
        leeway_s: by how much clocks may differ.
    """

    name: str
    issuer: str
    audience: str
    keys_url: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    user: str = "sub"
    groups: str = "groups"
    leeway_s: int = 30


@dataclass(slots=True)
class OidcTokens:
    """Knows people by one provider's access tokens; its keys are fetched, kept, and fetched anew as they rotate."""

    provider: Provider
    fetch: Fetch
    bindings: tuple[Binding, ...]
    clock: Clock
    _keys: dict[str, RSAKey | ECKey] = field(default_factory=dict)
    _fetched_s: float = float("-inf")
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def subject(self, token: str) -> Subject | None:
        """Return who shows this token; None where it is of another issuer, or not good."""
        header, said = unverified(token)
        if said.get("iss") != self.provider.issuer or header.get("alg") not in self.provider.algorithms:
            return None
        if "crit" in header or not isinstance(header.get("kid"), str):
            return None
        key = await self._key(header["kid"])
        if key is None:
            return None
        try:
            claims = self._claims(token, key)
        except (JoseError, ValueError, TypeError) as error:
            log.info("access.token_refused", issuer=self.provider.issuer, why=type(error).__name__)
            return None
        user = claims.get(self.provider.user)
        if not isinstance(user, str) or not user:
            return None
        groups = claims.get(self.provider.groups) or ()
        named = [one for one in groups if isinstance(one, str)] if isinstance(groups, list) else []
        return bound(self.provider.name, user, named, self.bindings)

    def _claims(self, token: str, key: RSAKey | ECKey) -> dict[str, Any]:
        """Return what a token says once its signature, issuer, audience and times are found good."""
        read = jwt.decode(token, key, algorithms=list(self.provider.algorithms))
        rules = jwt.JWTClaimsRegistry(
            now=self.clock.wall_us() // 1_000_000,
            leeway=min(self.provider.leeway_s, LEEWAY_MAX_S),
            iss={"essential": True, "value": self.provider.issuer},
            aud={"essential": True, "value": self.provider.audience},
            exp={"essential": True},
        )
        rules.validate(read.claims)
        return dict(read.claims)

    async def _key(self, kid: str) -> RSAKey | ECKey | None:
        """Return the key of this id; for an unknown one the keys are fetched again, once a minute at most."""
        if kid in self._keys and (self._age_s() <= KEYS_S or self._lock.locked()):
            return self._keys[kid]
        async with self._lock:  # who comes while they are fetched waits for them
            age_s = self._age_s()
            if age_s > KEYS_S or (kid not in self._keys and age_s > KEYS_AGAIN_S):
                await self._renew()
        return self._keys.get(kid)

    def _age_s(self) -> float:
        return self.clock.monotonic() - self._fetched_s

    async def _renew(self) -> None:
        self._fetched_s = self.clock.monotonic()
        try:
            listed = list(orjson.loads(await self.fetch(self.provider.keys_url))["keys"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("access.keys_unread", url=self.provider.keys_url, error=str(error))
            return
        self._keys = {str(key.kid): key for key in map(_key, listed) if key is not None and key.kid}


def _key(told: object) -> RSAKey | ECKey | None:
    """Return a key that signs; None for one of another kind, or that cannot be read: it spoils no other of its set."""
    try:
        (key,) = KeySet.import_key_set({"keys": [told]}).keys  # type: ignore[list-item]
    except (ValueError, TypeError, KeyError, AttributeError, JoseError):
        return None
    return key if isinstance(key, RSAKey | ECKey) else None


def unverified(token: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return header and claims as they are written, which proves nothing; empty ones for what is no such token."""
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        return {}, {}
    try:
        read = [orjson.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2]]
    except (ValueError, binascii.Error):
        return {}, {}
    return (read[0], read[1]) if all(isinstance(one, dict) for one in read) else ({}, {})
