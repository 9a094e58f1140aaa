"""Tessera's own API as the commands ask it: small, synchronous, and with nothing dear to import."""

from __future__ import annotations

import http.client
import os
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson
import typer

from scheduler.errors import TesseraError

TOKEN = "TESSERA_TOKEN"  # noqa: S105 - the name of the variable that holds one
DEFAULT = "http://127.0.0.1:8080"
TIMEOUT_S = 10.0
PAGE = 500
_REFUSED, _UNKNOWN = 400, 401


def _authorization() -> dict[str, str]:
    token = os.environ.get(TOKEN, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


class UnreachableError(TesseraError):
    """Nobody answers where the API should be."""

    code = "api.unreachable"


class RefusedError(TesseraError):
    """The API answered with a problem; its own code is kept."""

    def __init__(self, code: str, text: str) -> None:
        """Keep the problem's code and sentence."""
        super().__init__(text)
        self.code = code


class Api:
    """The API at one URL; every call is a connection of its own."""

    def __init__(self, url: str) -> None:
        """Take `http://HOST:PORT` or `https://HOST:PORT`, with or without a path. Raises typer.BadParameter."""
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host, self._port = "", None
        if parts.scheme not in {"http", "https"} or not self._host:
            raise typer.BadParameter(f"--api {url!r} is not a URL such as {DEFAULT}")
        self.url, self._scheme, self._path = url.rstrip("/"), parts.scheme, parts.path.rstrip("/")

    def ready(self) -> str:
        """Return an empty string when Tessera is ready, else the sentence why not. Raises UnreachableError."""
        status, body = self._ask("/readyz")
        return "" if status < _REFUSED else body.decode(errors="replace")

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Return one object of `/api/v1`.

        Raises:
            UnreachableError: no answer, or none of Tessera's.
            RefusedError: a problem document; its `code` and sentence.
        """
        where = f"/api/v1{path}" + (f"?{urlencode(query)}" if query else "")
        status, body = self._ask(where)
        try:
            found = orjson.loads(body)
        except orjson.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise UnreachableError(f"{self.url}{where} answered {status} and no JSON object; is --api Tessera's?")
        if status >= _REFUSED:
            text = str(found.get("detail", "refused"))
            if status == _UNKNOWN:
                said = "holds no valid token" if _authorization() else "is not set"
                text = f"{self.url} wants to know who asks, and {TOKEN} {said}; set {TOKEN} to a token of yours"
            raise RefusedError(str(found.get("code", f"http.{status}")), text)
        return found

    def items(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Return all items of a list, page by page. Raises like `get`."""
        found: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            page = self.get(path, **query, limit=str(PAGE), **({"cursor": cursor} if cursor else {}))
            found += page["items"]
            cursor = page["next"]
        return found

    def _ask(self, where: str) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", self._path + where, headers={"Accept": "application/json", **_authorization()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            said = getattr(error, "strerror", None) or error or type(error).__name__
            raise UnreachableError(
                f"{self.url} does not answer ({said}); is Tessera running there? Name its API with --api URL"
            ) from error
        finally:
            connection.close()
