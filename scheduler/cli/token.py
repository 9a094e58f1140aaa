"""`tessera token`: make, list and revoke API tokens in the file that `access.tokens` names; no server is asked."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from scheduler.clock import RealClock
from scheduler.config import seconds
from scheduler.errors import ConfigError
from scheduler.model.subject import Grant, Role
from scheduler.web.tokens import TOKENS_MAX, ApiToken, changing, new_token, read_tokens, take_out

from .output import console, reporting, say_json, table
from .places import state_folder

app = typer.Typer(name="token", help="Make, list and revoke API tokens.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", help="The file of `access.tokens`; default: in the state folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def _file(path: Path | None) -> Path:
    return path or state_folder() / "tokens.yaml"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who will use it, such as ci.")],
    *,
    role: Annotated[Role, typer.Option(help="What it allows.")] = Role.USER,
    namespace: Annotated[list[str] | None, typer.Option(help="A namespace that is its own; may be repeated.")] = None,
    queue: Annotated[list[str] | None, typer.Option(help="A queue that it answers for; may be repeated.")] = None,
    expires: Annotated[str, typer.Option(help="After how long it is void, such as 30d; 0 = never.")] = "90d",
    file: File = None,
    json: AsJson = False,
) -> None:
    """Make a token and show it, once; only its hash is kept."""
    with reporting(as_json=json):
        path = _file(file)
        grant = Grant(role, frozenset(namespace or ()), frozenset(queue or ()))
        _check(grant)
        text, made = new_token(name, grant, _until(expires))
        with changing(path) as tokens:
            if any(one.name == name for one in tokens):
                raise ConfigError(f"{path} has a token called {name}; revoke it first, or choose another name")
            if len(tokens) >= TOKENS_MAX:
                raise ConfigError(f"{path} has {TOKENS_MAX} tokens; revoke some first")
            tokens.append(made)
    if json:
        say_json({"token": text, **made.line(), "file": str(path)}, ok=True)
        return
    sys.stderr.write(f"In {path}. It is shown this once; Tessera takes it where `access.tokens` names that file.\n")
    sys.stdout.write(text + "\n")


def _check(grant: Grant) -> None:
    if grant.role in {Role.USER, Role.SERVICE} and not grant.namespaces:
        raise typer.BadParameter(f"a token of role {grant.role} reaches nothing without --namespace")
    if grant.role is Role.VIEWER and not (grant.namespaces or grant.queues):
        raise typer.BadParameter("a token of role viewer reaches nothing without --namespace or --queue")


def _until(expires: str) -> int:
    if expires == "0":
        return 0
    try:
        told = seconds(expires)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not isinstance(told, float):
        raise typer.BadParameter(f"{expires!r} is not a duration")
    return RealClock().wall_us() + int(told * 1_000_000)


@app.command("list")
def list_tokens(*, file: File = None, json: AsJson = False) -> None:
    """List tokens, without what could be used of them."""
    with reporting(as_json=json):
        tokens = read_tokens(_file(file))
    if json:
        lines = [{key: told for key, told in one.line().items() if key != "sha256"} for one in tokens]
        say_json({"tokens": lines}, ok=True)
        return
    console().print(table(("ID", "NAME", "ROLE", "NAMESPACES", "QUEUES", "EXPIRES"), map(_shown, tokens)))


def _shown(one: ApiToken) -> tuple[str, ...]:
    until = "never"
    if one.expires_us:
        at = datetime.fromtimestamp(one.expires_us / 1_000_000, UTC)
        until = f"{at:%Y-%m-%d %H:%M}" + (" (over)" if one.expires_us <= RealClock().wall_us() else "")
    names = (",".join(sorted(those)) or "-" for those in (one.grant.namespaces, one.grant.queues))
    return one.id, one.name, one.grant.role.value, *names, until


@app.command()
def revoke(
    named: Annotated[str, typer.Argument(help="Id or name.")], *, file: File = None, json: AsJson = False
) -> None:
    """Take tokens out of the file; a running Tessera refuses them within a second."""
    with reporting(as_json=json):
        path = _file(file)
        with changing(path) as tokens:
            gone = take_out(tokens, named)
            if not gone:
                raise ConfigError(f"{path} has no token {named}; list them with `tessera token list`")
    if json:
        say_json({"revoked": [one.id for one in gone]}, ok=True)
    else:
        sys.stdout.write(f"Revoked {', '.join(f'{one.name} ({one.id})' for one in gone)}.\n")
