"""Errors on the wire: RFC 9457 problem documents with stable codes, and bodies refused before they are read."""

from __future__ import annotations

import orjson
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from scheduler.errors import TesseraError

log = structlog.get_logger(__name__)


def problem(status: int, code: str, detail: str) -> web.Response:
    """Return a problem document; `code` is stable, `detail` is a sentence for people."""
    return web.Response(status=status, body=document(status, code, detail), content_type="application/problem+json")


def document(status: int, code: str, detail: str) -> bytes:
    """Return the body of a problem document."""
    return orjson.dumps({"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code})


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into a problem document; one bad request never ends the process."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge as error:
        return problem(413, "body.too_large", error.text or "the body is too large")
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 - a redirect is not a problem
            raise
        return problem(error.status, f"http.{error.status}", error.reason)
    except TesseraError as error:
        return problem(503, error.code, str(error))
    except Exception:
        log.exception("http.failed", path=request.path)
        return problem(500, "internal", "something went wrong inside Tessera; its log has the details")


@web.middleware
async def refuse_encodings(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse compressed bodies: nobody needs them here and they unpack to any size."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        return problem(415, "body.encoded", "send the body without Content-Encoding")
    return await handler(request)
