"""API tokens: known by their hash, void when over or revoked, read anew when the file changes."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from scheduler.errors import ConfigError
from scheduler.model.subject import Grant, Role
from scheduler.web.tokens import ApiToken, ApiTokens, changing, digest, new_token, read_tokens, take_out, write_tokens
from tests.cli.stage import tessera
from tests.web.test_bearer import NOW_S, Clock

GRANT = Grant(Role.USER, frozenset({"vision"}), frozenset({"research"}))


def test_a_file_reads_back_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    made = [new_token(f"한국 {number}", GRANT, (NOW_S + number) * 1_000_000)[1] for number in range(3)]
    made.append(new_token("for ever", Grant(Role.ADMIN))[1])
    path = tmp_path / "in" / "tokens.yaml"
    write_tokens(path, made)
    assert read_tokens(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_tokens(tmp_path / "absent") == []


def test_a_secret_is_not_in_the_file_and_no_two_tokens_are_alike(tmp_path: Path) -> None:
    texts = {new_token("one", GRANT)[0] for _ in range(100)}
    for part in (1, 2):
        assert len({text.split("_", 2)[part] for text in texts}) == 100
    text, made = new_token("one", GRANT)
    write_tokens(tmp_path / "tokens.yaml", [made])
    assert text.split("_", 2)[2] not in (tmp_path / "tokens.yaml").read_text()
    assert made.sha256 == digest(text)


async def test_a_token_is_known_until_it_is_over_or_revoked(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens.yaml", Clock()
    short, made = new_token("short", GRANT, (NOW_S + 60) * 1_000_000)
    long, other = new_token("long", GRANT)
    write_tokens(path, [made, other])
    known = ApiTokens(path, clock)  # type: ignore[arg-type]
    for text, name in ((short, "short"), (long, "long")):
        found = await known.subject(text)
        assert found is not None
        assert (found.name, found.grants) == (f"token:{name}", (GRANT,))
    for wrong in (
        short[:-1],
        short + "x",
        short.upper(),
        long.replace("tessera_", "Tessera_"),
        f"tessera_{made.id}_",
        "",
    ):
        assert await known.subject(wrong) is None
    swapped = f"tessera_{made.id}_{long.split('_', 2)[2]}"
    assert await known.subject(swapped) is None
    clock.now_s += 60
    assert await known.subject(short) is None
    with changing(path) as tokens:
        assert [one.name for one in take_out(tokens, "long")] == ["long"]
    clock.now_s += 1
    assert await known.subject(long) is None


async def test_a_file_that_cannot_be_read_changes_nothing_and_is_named_once(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens.yaml", Clock()
    text, made = new_token("one", GRANT)
    write_tokens(path, [made])
    known = ApiTokens(path, clock)  # type: ignore[arg-type]
    assert await known.subject(text)
    path.write_text("tokens: [")
    with capture_logs() as logs:
        for _ in range(5):
            clock.now_s += 2
            assert await known.subject(text)
    assert [line["event"] for line in logs] == ["tokens.unread"]
    await asyncio.to_thread(path.unlink)
    clock.now_s += 2
    assert await known.subject(text) is None


async def test_a_file_that_was_changed_in_its_place_is_read_again(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens.yaml", Clock()
    (first, made), (second, other) = new_token("one", GRANT), new_token("two", GRANT)
    write_tokens(path, [made])
    known = ApiTokens(path, clock)  # type: ignore[arg-type]
    assert await known.subject(first)
    was = path.stat()
    path.write_text(path.read_text().replace(made.id, other.id).replace(made.sha256, other.sha256))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # as a copy that keeps times, or a change of rights alone
    clock.now_s += 2
    assert await known.subject(first) is None
    assert await known.subject(second)


async def test_nobody_but_those_with_tokens_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    text, made = new_token("one", GRANT)

    def slow(_: Path) -> list[ApiToken]:
        go.wait(5)
        return [made]

    monkeypatch.setattr("scheduler.web.tokens.read_tokens", slow)
    known = ApiTokens(tmp_path / "tokens.yaml", Clock())  # type: ignore[arg-type]
    calls = [asyncio.create_task(known.subject(text)) for _ in range(3)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(call.done() for call in calls)
    go.set()
    assert all(await asyncio.gather(*calls))


def test_two_who_change_the_file_at_once_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "made" / "tokens.yaml"

    def add(number: int) -> None:
        with changing(path) as tokens:
            tokens.append(new_token(f"t{number}", GRANT)[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert {one.name for one in read_tokens(path)} == {f"t{number}" for number in range(40)}


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    write_tokens(path, [new_token("one", GRANT)[1]])
    was = path.read_text()

    def fail() -> None:
        with changing(path) as tokens:
            tokens.clear()
            raise ConfigError

    with pytest.raises(ConfigError):
        fail()
    assert path.read_text() == was


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tokens: [", "not YAML"),
        ("[]", "must be `tokens:`"),
        ("tokens: 1", "must be `tokens:`"),
        ("tokens: [1]", "needs id, name"),
        ("tokens: [{id: a, name: b, sha256: c}]", "needs id, name"),
        ("tokens: [{id: a, name: b, sha256: c, role: root}]", "admin, operator, user, viewer, service"),
        ("tokens: [{id: a, name: b, sha256: c, role: user, until: 1}]", "unknown key until"),
        ("tokens: [{id: a, name: b, sha256: c, role: user, namespaces: vision}]", "namespaces must be a list"),
        ("tokens: [{id: a, name: b, sha256: c, role: user, queues: [1]}]", "queues must be a list"),
        ("tokens: [{id: a, name: b, sha256: c, role: user, expires: soon}]", "expires must be a time"),
        ("tokens: [{id: a, name: b, sha256: c, role: user}, {id: a, name: c, sha256: d, role: user}]", "one id"),
    ],
)
def test_an_odd_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_tokens(path)


def test_a_time_without_zone_is_utc(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text("tokens: [{id: a, name: b, sha256: c, role: user, expires: 2027-01-15T08:00:00}]")
    assert read_tokens(path) == [ApiToken("a", "b", "c", Grant(Role.USER), NOW_S * 1_000_000)]


async def test_the_commands_make_list_and_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ("--file", str(tmp_path / "tokens.yaml"))
    made = await tessera(capsys, "token", "create", "ci", "--role", "service", "--namespace", "vision", *file, "--json")
    assert made.code == 0
    text = made.json["token"]
    assert {key: made.json[key] for key in ("name", "role", "namespaces", "ok")} == {
        "name": "ci",
        "role": "service",
        "namespaces": ["vision"],
        "ok": True,
    }
    known = ApiTokens(tmp_path / "tokens.yaml", Clock())  # type: ignore[arg-type]
    found = await known.subject(text)
    assert found is not None
    listed = await tessera(capsys, "token", "list", *file)
    assert "ci" in listed.out
    assert text.split("_", 2)[2] not in listed.out
    twice = await tessera(capsys, "token", "create", "ci", "--namespace", "vision", *file)
    assert (twice.code, "revoke it first" in twice.err) == (1, True)
    nothing = await tessera(capsys, "token", "create", "user", *file)
    assert (nothing.code, "--namespace" in nothing.err) == (64, True)
    assert (await tessera(capsys, "token", "create", "x", "--role", "admin", "--expires", "soon", *file)).code == 64
    assert (await tessera(capsys, "token", "revoke", "nobody", *file)).code == 1
    assert (await tessera(capsys, "token", "revoke", "ci", *file)).code == 0
    assert read_tokens(tmp_path / "tokens.yaml") == []
