"""API tokens: random, shown once, kept as hashes in a file that people and `tessera token` edit.

A token reads `tessera_ID_SECRET`. The file holds the SHA-256 of the whole token, which is enough for 256 random bits.
Invariant: a file that cannot be read grants nothing new and takes nothing away; its error is logged once a change.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import yaml

from scheduler.clock import Clock
from scheduler.errors import ConfigError
from scheduler.model.subject import Grant, Role, Subject

log = structlog.get_logger(__name__)

PREFIX = "tessera_"
TOKENS_MAX = 10_000
FILE_MAX = 8 << 20
LOOK_S = 1.0
KEYS = frozenset({"id", "name", "sha256", "role", "namespaces", "queues", "expires"})


@dataclass(frozen=True, slots=True)
class ApiToken:
    """What the file knows of one token.

    Attributes:
        id: 12 characters; part of the token.
        name: who uses it.
        sha256: of the whole token, in hex.
        grant: what it allows.
        expires_us: wall time after which it is void; 0 = never.
    """

    id: str
    name: str
    sha256: str
    grant: Grant
    expires_us: int = 0

    def line(self) -> dict[str, Any]:
        """Return it as the file has it."""
        told = {"id": self.id, "name": self.name, "sha256": self.sha256, "role": self.grant.role.value}
        lists = {"namespaces": sorted(self.grant.namespaces), "queues": sorted(self.grant.queues)}
        until = datetime.fromtimestamp(self.expires_us / 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return told | {key: one for key, one in lists.items() if one} | ({"expires": until} if self.expires_us else {})


def new_token(name: str, grant: Grant, expires_us: int = 0) -> tuple[str, ApiToken]:
    """Return a new token's text, which is shown once, and what is kept of it."""
    number, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    text = f"{PREFIX}{number}_{secret}"
    return text, ApiToken(number, name, digest(text), grant, expires_us)


def digest(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> list[ApiToken]:
    """Read the file; an absent one holds none. Raises ConfigError."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= FILE_MAX else ""
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if size > FILE_MAX:
        raise ConfigError(f"{path}: has {size} bytes; at most {FILE_MAX} are read")
    try:
        tree = yaml.load(text, yaml.CSafeLoader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    listed = tree.get("tokens") if isinstance(tree, dict) else None
    if not isinstance(listed, list) or len(listed) > TOKENS_MAX:
        raise ConfigError(f"{path}: must be `tokens:` with a list of at most {TOKENS_MAX}")
    found = [_token(one, f"{path}: tokens[{number}]") for number, one in enumerate(listed)]
    if len({one.id for one in found}) < len(found):
        raise ConfigError(f"{path}: two tokens have one id; revoke one of them")
    return found


@contextmanager
def changing(path: Path) -> Generator[list[ApiToken]]:
    """Give out the tokens of a file, and write down what has become of the list; two who change it take turns.

    Raises:
        ConfigError: it cannot be read or written; then it is as it was.
    """
    folder = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError as error:
        if folder >= 0:
            os.close(folder)
        raise ConfigError(f"{path}: cannot be written: {error}") from error
    try:
        tokens = read_tokens(path)
        yield tokens
        write_tokens(path, tokens)
    finally:
        os.close(folder)


def write_tokens(path: Path, tokens: Iterable[ApiToken]) -> None:
    """Replace the file at once; only its owner may read it. Raises ConfigError."""
    text = yaml.safe_dump({"tokens": [one.line() for one in tokens]}, sort_keys=False, allow_unicode=True)
    write_secret(path, text)


def write_secret(path: Path, text: str) -> None:
    """Put a text into a file that only its owner may read, whole or not at all. Raises ConfigError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        beside.touch(mode=0o600, exist_ok=False)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error


def _token(one: object, where: str) -> ApiToken:
    if not isinstance(one, dict) or not one.keys() >= {"id", "name", "sha256", "role"}:
        raise ConfigError(f"{where}: needs id, name, sha256 and role; make it with `tessera token create`")
    if unknown := one.keys() - KEYS:
        raise ConfigError(f"{where}: unknown key {min(map(str, unknown))}; allowed are {', '.join(sorted(KEYS))}")
    try:
        role = Role(one["role"])
    except ValueError as error:
        raise ConfigError(f"{where}: role must be one of {', '.join(Role)}") from error
    grant = Grant(role, _names(one, "namespaces", where), _names(one, "queues", where))
    return ApiToken(str(one["id"]), str(one["name"]), str(one["sha256"]), grant, _until(one.get("expires"), where))


def _names(one: dict[str, Any], key: str, where: str) -> frozenset[str]:
    listed = one.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
        raise ConfigError(f"{where}: {key} must be a list of names")
    return frozenset(listed)


def _until(told: object, where: str) -> int:
    if told is None:
        return 0
    try:
        at = told if isinstance(told, datetime) else datetime.fromisoformat(str(told))
    except ValueError as error:
        raise ConfigError(f"{where}: expires must be a time such as 2027-01-31T00:00:00Z") from error
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1_000_000)


@dataclass(slots=True)
class ApiTokens:
    """Knows people by the tokens of a file, which is read again when it has changed.

    Attributes:
        path: the file; None = only tokens that `admit` was given.
    """

    path: Path | None
    clock: Clock
    _tokens: dict[str, ApiToken] = field(default_factory=dict)
    _own: dict[str, ApiToken] = field(default_factory=dict)
    _seen: tuple[int, int, int, int] | None = None
    _looked_s: float = float("-inf")
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def admit(self, token: ApiToken) -> None:
        """Take a token that is in no file."""
        self._own[token.id] = token

    async def subject(self, token: str) -> Subject | None:
        """Return who shows this token, None where it is unknown, revoked or over."""
        if not token.startswith(PREFIX):
            return None
        async with self._reading:
            await self._look()
        number = token.removeprefix(PREFIX).partition("_")[0]
        known = self._own.get(number) or self._tokens.get(number)
        if known is None or not hmac.compare_digest(known.sha256.encode(), digest(token).encode()):
            return None
        if known.expires_us and known.expires_us <= self.clock.wall_us():
            return None
        return Subject(f"token:{known.name}", (known.grant,))

    async def _look(self) -> None:
        """Read the file when it is another than the one that was read, at most once a second.

        Ten thousand tokens take a second to read: nothing else waits for them.
        """
        now_s = self.clock.monotonic()
        if self.path is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            state = self.path.stat()
            seen = (state.st_ino, state.st_mtime_ns, state.st_ctime_ns, state.st_size)
        except OSError:
            seen = (0, 0, 0, 0)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._tokens = {one.id: one for one in await asyncio.to_thread(read_tokens, self.path)}
        except ConfigError as error:
            log.warning("tokens.unread", text=str(error))


def take_out(tokens: list[ApiToken], named: str) -> list[ApiToken]:
    """Take out and return the tokens of which this is the id or the name."""
    gone = [one for one in tokens if named in {one.id, one.name}]
    tokens[:] = [one for one in tokens if one not in gone]
    return gone
