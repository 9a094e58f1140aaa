"""Tokens of others: 200 vectors of what a provider may sign and a forger may write, key rotation, and TokenReviews."""

from __future__ import annotations

import asyncio
import base64
import hmac
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc import jws, jwt
from joserfc.jwk import ECKey, RSAKey

from scheduler.model.subject import Grant, Role, Subject
from scheduler.web.access import Binding
from scheduler.web.bearer import (
    KNOWN_S,
    REVIEWS_AT_ONCE,
    REVIEWS_BURST,
    CrowdedError,
    KubernetesTokens,
    OidcTokens,
    Provider,
    Review,
)

NOW_S = 1_800_000_000
ISSUER, AUDIENCE, URL = "https://id.example.org", "tessera", "https://id.example.org/keys"
RSA, OTHER_RSA = (RSAKey.generate_key(2048, {"kid": kid}) for kid in ("rsa", "rsa"))
EC = ECKey.generate_key("P-256", {"kid": "ec"})
NEXT = ECKey.generate_key("P-256", {"kid": "next"})
GOOD = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW_S + 600, "iat": NOW_S - 5, "groups": ["team"]}
BINDINGS = (
    Binding(Grant(Role.USER, frozenset({"vision"})), users=frozenset({"oidc:alice"})),
    Binding(Grant(Role.OPERATOR), groups=frozenset({"oidc:team"})),
)


@dataclass
class Clock:
    now_s: float = NOW_S

    def wall_us(self) -> int:
        return int(self.now_s * 1_000_000)

    def monotonic(self) -> float:
        return self.now_s


@dataclass
class Site:
    """A provider's JWKS, which may be down."""

    keys: list[RSAKey | ECKey] = field(default_factory=lambda: [RSA, EC])
    asked: int = 0
    down: bool = False

    async def fetch(self, url: str) -> bytes:
        assert url == URL
        self.asked += 1
        if self.down:
            raise OSError("no route to host")
        shown = [key.as_dict(private=False) for key in self.keys]
        return orjson.dumps({"keys": shown})


def tokens(site: Site | None = None, clock: Clock | None = None, **how: Any) -> OidcTokens:
    provider = Provider("oidc", ISSUER, AUDIENCE, URL, **how)
    return OidcTokens(provider, (site or Site()).fetch, BINDINGS, clock or Clock())  # type: ignore[arg-type]


def signed(claims: dict[str, Any], key: RSAKey | ECKey = RSA, **header: Any) -> str:
    algorithm = {"RSA": "RS256", "EC": "ES256"}[key.key_type]
    told = {"alg": algorithm, "kid": key.kid, **header}
    registry = jws.JWSRegistry(algorithms=[str(told["alg"])], strict_check_header=False)
    return jwt.encode(told, claims, key, registry=registry)


def written(header: dict[str, Any], claims: Any, signature: str = "") -> str:
    parts = (base64.urlsafe_b64encode(orjson.dumps(part)).rstrip(b"=").decode() for part in (header, claims))
    return ".".join((*parts, signature))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


ACCEPTED: list[tuple[str, Callable[[], str]]] = [
    ("as it should be", lambda: signed(GOOD)),
    ("by the elliptic key", lambda: signed(GOOD, EC)),
    ("one of several audiences", lambda: signed({**GOOD, "aud": ["a", AUDIENCE]})),
    ("over within the leeway", lambda: signed({**GOOD, "exp": NOW_S - 20})),
    ("begins within the leeway", lambda: signed({**GOOD, "nbf": NOW_S + 20})),
    ("with claims nobody asked for", lambda: signed({**GOOD, "roles": ["admin"], "role": "admin"})),
    ("of a known type", lambda: signed(GOOD, typ="at+jwt")),
]

ODD = (None, 0, 1, -1, "", "x", [], {}, True, ["x"], {"x": 1}, "nul\0", 1.5, 10**30)
REFUSED: list[tuple[str, Callable[[], str]]] = [
    *((f"iss {odd!r}", lambda odd=odd: signed({**GOOD, "iss": odd})) for odd in (*ODD, ISSUER + "/", ISSUER.upper())),
    *(
        (f"aud {odd!r}", lambda odd=odd: signed({**GOOD, "aud": odd}))
        for odd in (*ODD, "tessera2", ["a"], [[AUDIENCE]])
    ),
    *((f"sub {odd!r}", lambda odd=odd: signed({**GOOD, "sub": odd})) for odd in (None, 0, "", [], {}, ["alice"], True)),
    *((f"exp {odd!r}", lambda odd=odd: signed({**GOOD, "exp": odd})) for odd in (None, "", "x", [], {}, -1, 0, "9e9")),
    *((f"late by {late}", lambda late=late: signed({**GOOD, "exp": NOW_S - late})) for late in (31, 60, 61, 3600)),
    *((f"early by {early}", lambda early=early: signed({**GOOD, "nbf": NOW_S + early})) for early in (31, 61, 3600)),
    *((f"without {name}", lambda name=name: signed(without(name))) for name in ("iss", "aud", "exp", "sub")),
    *(
        (f"algorithm {name!r} unsigned", lambda name=name: written({"alg": name, "kid": "rsa"}, GOOD))
        for name in ("none", "None", "NONE", "", "RS256", "ES256", "HS256", "EdDSA", None, 1, ["RS256"], {})
    ),
    *(
        (f"kid {kid!r}", lambda kid=kid: signed(GOOD, RSA, kid=kid))
        for kid in ("other", "", "ec", "../rsa", "rsa\0", "RSA", "rsa ", "' or 1=1")
    ),
    ("no kid", lambda: written({"alg": "RS256"}, GOOD, signed(GOOD).rpartition(".")[2])),
    ("another key of that name", lambda: signed(GOOD, OTHER_RSA)),
    ("the public key as a secret", lambda: _by_secret(RSA.as_pem(private=False))),
    ("another secret", lambda: _by_secret(b"x" * 32)),
    ("its own key in the header", lambda: signed(GOOD, OTHER_RSA, jwk=OTHER_RSA.as_dict(private=False))),
    ("its own key's place", lambda: signed(GOOD, OTHER_RSA, jku="https://evil.example.org/keys")),
    ("its own certificate", lambda: signed(GOOD, OTHER_RSA, x5u="https://evil.example.org/cert")),
    ("something critical", lambda: written({"alg": "RS256", "kid": "rsa", "crit": ["exp"], "exp": 1}, GOOD, "AAAA")),
    ("critical and signed", lambda: _by_us({"crit": ["b64"], "b64": True})),
    ("not encoded", lambda: _by_us({"b64": False})),
    ("an algorithm not allowed", lambda: signed(GOOD, RSA, alg="RS512")),
    ("padded differently", lambda: signed(GOOD, RSA, alg="PS256")),
    ("claims that are a list", lambda: written({"alg": "RS256", "kid": "rsa"}, [GOOD], "AAAA")),
    *((f"{what}", lambda what=what: what) for what in ("", ".", "..", "a.b.c", "a.b", "a.b.c.d", "....", "\u00e4.b.c")),
    *((f"cut after {length}", lambda length=length: signed(GOOD)[:length]) for length in range(0, 540, 10)),
    *((f"byte {place} changed", lambda place=place: _changed(place)) for place in range(3, 540, 10)),
]


def _by_us(more: dict[str, Any]) -> str:
    head, claims, _ = written({"alg": "RS256", "kid": "rsa", **more}, GOOD).split(".")
    made = RSA.private_key.sign(f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr]
    return f"{head}.{claims}.{base64.urlsafe_b64encode(made).rstrip(b'=').decode()}"


def _by_secret(secret: bytes) -> str:
    text = written({"alg": "HS256", "kid": "rsa"}, GOOD).removesuffix(".")
    made = base64.urlsafe_b64encode(hmac.digest(secret, text.encode(), "sha256")).rstrip(b"=")
    return f"{text}.{made.decode()}"


def _changed(place: int) -> str:
    text = signed(GOOD)
    other = "A" if text[place] != "A" else "B"
    return text[:place] + (other if text[place] != "." else "_") + text[place + 1 :]


def test_there_are_two_hundred_vectors_no_two_alike() -> None:
    assert len(REFUSED) >= 200
    assert len({name for name, _ in (*ACCEPTED, *REFUSED)}) == len(ACCEPTED) + len(REFUSED)


@pytest.mark.parametrize(("name", "make"), ACCEPTED)
async def test_a_good_token_names_its_user_and_gives_what_is_bound(name: str, make: Callable[[], str]) -> None:
    found = await tokens().subject(make())
    assert found is not None, name
    assert found.name == "oidc:alice"
    assert {grant.role for grant in found.grants} == {Role.USER, Role.OPERATOR}  # never what the token says of roles


@pytest.mark.parametrize(("name", "make"), REFUSED)
async def test_everything_else_is_nobodys(name: str, make: Callable[[], str]) -> None:
    assert await tokens().subject(make()) is None, name


@pytest.mark.parametrize("groups", [None, "team", {"team": 1}, 1, [1, None, ["team"]], []])
async def test_groups_that_are_no_list_of_names_give_nothing(groups: Any) -> None:
    found = await tokens().subject(signed({**GOOD, "groups": groups}))
    assert found == Subject("oidc:alice", (BINDINGS[0].grant,))


async def test_user_and_groups_may_be_other_claims() -> None:
    found = await tokens(user="email", groups="teams").subject(signed({**GOOD, "email": "a@b", "teams": ["team"]}))
    assert found == Subject("oidc:a@b", (BINDINGS[1].grant,))


async def test_keys_are_fetched_once_and_again_when_they_rotate_at_most_once_a_minute() -> None:
    site, clock = Site(), Clock()
    known = tokens(site, clock)
    for _ in range(5):
        assert await known.subject(signed(GOOD))
    assert site.asked == 1
    site.keys = [EC, NEXT]
    assert await known.subject(signed(GOOD, NEXT)) is None  # it was asked this very minute
    for number in range(20):
        assert await known.subject(signed(GOOD, RSA, kid=f"made-up-{number}")) is None
    assert site.asked == 1
    clock.now_s += 61
    assert await known.subject(signed(GOOD, NEXT))
    assert site.asked == 2
    assert await known.subject(signed(GOOD, RSA)) is None  # it was taken back
    clock.now_s += 3601
    assert await known.subject(signed({**GOOD, "exp": clock.now_s + 60}, EC))
    assert site.asked == 3


async def test_a_provider_that_is_down_keeps_the_keys_that_were_known() -> None:
    site, clock = Site(), Clock()
    known = tokens(site, clock)
    assert await known.subject(signed(GOOD))
    site.down = True
    clock.now_s += 3700
    assert await known.subject(signed({**GOOD, "exp": clock.now_s + 60}))
    assert site.asked == 2
    assert await tokens(site).subject(signed(GOOD)) is None


async def test_keys_that_are_no_keys_are_passed_over() -> None:
    async def fetch(_: str) -> bytes:
        return next(answers)

    answers = iter(
        (
            b"",
            b"[]",
            b"{}",
            b'{"keys": 1}',
            b'{"keys": [{"kty": "oct", "k": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "kid": "rsa"}]}',
        )
    )
    clock = Clock()
    known = OidcTokens(Provider("oidc", ISSUER, AUDIENCE, URL), fetch, BINDINGS, clock)  # type: ignore[arg-type]
    for _ in range(5):
        assert await known.subject(signed(GOOD)) is None
        clock.now_s += 61


async def test_who_comes_while_the_keys_are_fetched_waits_for_them() -> None:
    go, fetched = asyncio.Event(), 0

    async def fetch(_: str) -> bytes:
        nonlocal fetched
        fetched += 1
        await go.wait()
        return orjson.dumps({"keys": [RSA.as_dict(private=False)]})

    clock = Clock()
    known = OidcTokens(Provider("oidc", ISSUER, AUDIENCE, URL), fetch, BINDINGS, clock)  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        tasks = [asyncio.create_task(known.subject(signed(GOOD))) for _ in range(5)]
        for _ in range(10):
            await asyncio.sleep(0)
        go.set()
        assert all(await asyncio.gather(*tasks))
        assert fetched == 1
        go.clear()
        clock.now_s += 3601
        later = signed(GOOD | {"exp": NOW_S + 9999})
        first = asyncio.create_task(known.subject(later))
        await asyncio.sleep(0)
        assert await known.subject(later) is not None, "what is known is good enough while it is fetched anew"
        go.set()
        assert await first is not None
    assert fetched == 2


@pytest.mark.parametrize(
    "odd",
    [
        {"kty": "OKP", "crv": "X448", "x": "AAAA", "kid": "new"},
        {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA", "kid": "newer"},
        {"kty": "EC", "crv": "P-256", "x": "AQ", "y": "AQ", "kid": "broken"},
        {"kty": "RSA", "n": 1, "e": 2, "kid": "broken"},
        {"kid": "nothing"},
        {"kty": "oct", "k": "A" * 43, "kid": "shared"},
        {},
        None,
        1,
        [],
    ],
)
async def test_a_key_that_cannot_be_read_spoils_no_other(odd: object) -> None:
    async def fetch(_: str) -> bytes:
        return orjson.dumps({"keys": [odd, RSA.as_dict(private=False), odd]})

    known = OidcTokens(Provider("oidc", ISSUER, AUDIENCE, URL), fetch, BINDINGS, Clock())  # type: ignore[arg-type]
    assert await known.subject(signed(GOOD)) is not None


@dataclass
class Reviewer:
    answer: tuple[str, tuple[str, ...]] | None
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    async def review(self, token: str, audiences: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
        self.asked.append((token, tuple(audiences)))
        return self.answer


def kubernetes(review: Review, clock: Clock) -> KubernetesTokens:
    grant = Grant(Role.SERVICE, frozenset({"vision"}))
    bindings = (
        Binding(grant, users=frozenset({"kubernetes:system:serviceaccount:vision:ci"})),
        Binding(Grant(Role.ADMIN), groups=frozenset({"kubernetes:system:masters"})),
    )
    return KubernetesTokens(review, ("tessera",), bindings, clock)  # type: ignore[arg-type]


async def test_the_api_server_is_asked_once_a_minute_about_a_token() -> None:
    reviewer, clock = Reviewer(("system:serviceaccount:vision:ci", ("system:serviceaccounts",))), Clock()
    known = kubernetes(reviewer.review, clock)
    for _ in range(3):
        found = await known.subject("abc")
    assert found is not None
    assert (found.name, [grant.role for grant in found.grants]) == (
        "kubernetes:system:serviceaccount:vision:ci",
        [Role.SERVICE],
    )
    assert reviewer.asked == [("abc", ("tessera",))]
    reviewer.answer = None
    clock.now_s += 61
    assert await known.subject("abc") is None
    clock.now_s += 9
    assert await known.subject("abc") is None
    assert len(reviewer.asked) == 2
    reviewer.answer = ("alice", ("system:masters",))
    clock.now_s += 2
    found = await known.subject("abc")
    assert found is not None
    assert [grant.role for grant in found.grants] == [Role.ADMIN]


async def test_what_is_known_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.web.bearer.KNOWN_MAX", 8)
    reviewer = Reviewer(None)
    known = kubernetes(reviewer.review, Clock())
    for number in itertools.chain(range(50), range(50)):
        await known.subject(f"token-{number}")
    assert len(known._known) == 8
    assert len(reviewer.asked) == 100
    assert all(b"token" not in key for key in known._known)


async def test_made_up_tokens_take_little_of_the_api_servers_time_and_nothing_from_those_who_are_known() -> None:
    reviewer, clock = Reviewer(("system:serviceaccount:vision:ci", ())), Clock()
    known = kubernetes(reviewer.review, clock)
    assert await known.subject("good") is not None
    reviewer.answer, refused = None, 0
    for number in range(1000):
        try:
            assert await known.subject(f"made-up-{number}") is None
        except CrowdedError:
            refused += 1
    assert len(reviewer.asked) == REVIEWS_BURST
    assert refused == 1001 - REVIEWS_BURST
    assert await known.subject("good") is not None
    clock.now_s += KNOWN_S
    while True:
        try:
            await known.subject(f"more-{len(reviewer.asked)}")
        except CrowdedError:
            break
    reviewer.answer = ("system:serviceaccount:vision:ci", ())
    assert await known.subject("good") is not None, "asked about again, whatever strangers do"


async def test_few_reviews_are_under_way_at_once_and_one_token_needs_one() -> None:
    go, under_way, most, asked = asyncio.Event(), 0, 0, 0

    async def review(_token: str, _audiences: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
        nonlocal under_way, most, asked
        under_way, asked = under_way + 1, asked + 1
        most = max(most, under_way)
        await go.wait()
        under_way -= 1
        return "alice", ()

    known = kubernetes(review, Clock())
    async with asyncio.timeout(5):
        tasks = [asyncio.create_task(known.subject(f"token-{number % 20}")) for number in range(40)]
        for _ in range(10):
            await asyncio.sleep(0)
        go.set()
        found = await asyncio.gather(*tasks)
    assert most == REVIEWS_AT_ONCE
    assert asked == 20
    assert all(one is not None and one.name == "kubernetes:alice" for one in found)
