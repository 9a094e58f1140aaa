"""The extender over TLS: who has no business here is turned away before a byte of a body is read."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme
import uvloop

from scheduler.errors import ConfigError
from scheduler.web.http1 import ListenerRunner, Route
from scheduler.web.tls import Files, MutualTlsSite, RotatingContext, names_of

CLIENT = "kube-scheduler.tessera"
YESTERDAY = datetime.now(UTC) - timedelta(days=1)
PATIENCE_S = 4.0  # less than the handshake's own limit
NEVER_FINISHED = b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
COMPLETE = b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class Stage:
    """A listener with files of its own, what reached the application behind it, and clients of any kind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ours = folder, trustme.CA()
        self.clients = trustme.CA()
        self.files = Files(folder / "tls.crt", folder / "tls.key", folder / "client-ca.crt")
        self.write()
        self.reached: list[str] = []
        self.port = 0

    def write(self) -> None:
        server = self.ours.issue_cert("127.0.0.1")
        server.private_key_pem.write_to_path(str(self.files.key))
        self.files.cert.write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        self.clients.cert_pem.write_to_path(str(self.files.client_ca))

    def handle(self, body: bytes) -> tuple[int, bytes]:
        self.reached.append("/scheduler/filter")
        return 200, b"%d" % len(body)

    @asynccontextmanager
    async def listening(self, *allowed: str) -> AsyncIterator[RotatingContext]:
        runner = ListenerRunner({"/scheduler/filter": Route("POST", self.handle)}, 1 << 20, shutdown_timeout=0.1)
        await runner.setup()
        context = RotatingContext.of(self.files)
        await MutualTlsSite(runner, "127.0.0.1", 0, context=context, allowed=allowed or (CLIENT,)).start()
        self.port = runner.addresses[0][1]
        try:
            yield context
        finally:
            await runner.cleanup()

    def context(self, certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
        made = ssl.create_default_context()
        self.ours.configure_trust(made)
        made.set_alpn_protocols(["h2", "http/1.1"])
        if certificate:
            certificate.configure_cert(made)
        return made

    async def ask(self, context: ssl.SSLContext | None, sent: bytes) -> bytes:
        """Send and return all that comes back until the other side closes; b"" when it never spoke."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
            except (ssl.SSLError, ConnectionError):
                return b""
            try:
                writer.write(sent)
                return await reader.read()
            except (ssl.SSLError, ConnectionError):
                return b""
            finally:
                writer.close()

    async def spoken(self, context: ssl.SSLContext) -> tuple[str | None, str | None, str]:
        """Return protocol, ALPN and the listener's issuer of a new connection."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        tls = writer.get_extra_info("ssl_object")
        found = tls.version(), tls.selected_alpn_protocol(), str(tls.getpeercert()["issuer"])
        writer.close()
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def run(loop: LoopFactory, story: Awaitable[Any]) -> None:
    async def all_of_it() -> None:
        await story

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(all_of_it())


@pytest.mark.parametrize("loop", LOOPS)
def test_the_right_client_is_served_in_http_1_1_over_tls_1_3(stage: Stage, loop: LoopFactory) -> None:
    async def story() -> None:
        context = stage.context(stage.clients.issue_cert(CLIENT.upper(), common_name="anything"))
        async with stage.listening():
            answer = await stage.ask(context, COMPLETE)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert (await stage.spoken(context))[:2] == ("TLSv1.3", "http/1.1")

    run(loop, story())
    assert stage.reached == ["/scheduler/filter"]


STRANGERS: dict[str, Callable[[Stage], ssl.SSLContext | None]] = {
    "plain text": lambda _: None,
    "no certificate": lambda stage: stage.context(),
    "another CA": lambda stage: stage.context(trustme.CA().issue_cert(CLIENT)),
    "the server's CA": lambda stage: stage.context(stage.ours.issue_cert(CLIENT)),
    "expired": lambda stage: stage.context(stage.clients.issue_cert(CLIENT, not_after=YESTERDAY)),
    "another name": lambda stage: stage.context(stage.clients.issue_cert("kubelet.tessera")),
    "the name only as common name": lambda stage: stage.context(stage.clients.issue_cert("x.y", common_name=CLIENT)),
    "a name within the name": lambda stage: stage.context(stage.clients.issue_cert("x." + CLIENT)),
    "TLS 1.2": lambda stage: older(stage.context(stage.clients.issue_cert(CLIENT))),
}


def older(context: ssl.SSLContext) -> ssl.SSLContext:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("sent", [NEVER_FINISHED, COMPLETE], ids=["body never comes", "whole request"])
@pytest.mark.parametrize("who", STRANGERS)
def test_strangers_are_refused_before_a_body_is_read(stage: Stage, who: str, sent: bytes, loop: LoopFactory) -> None:
    answers: list[bytes] = []

    async def story() -> None:
        async with stage.listening():
            answers.append(await stage.ask(STRANGERS[who](stage), sent))

    run(loop, story())
    assert stage.reached == []
    if answers != [b""]:
        head, _, said = answers[0].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 403 ")
        assert orjson.loads(said)["code"] == "access.denied"
    elif "name" in who and sent is NEVER_FINISHED:
        pytest.fail("a certificate of our CA that names somebody else is told why")


async def test_the_list_takes_uris_as_they_are(stage: Stage) -> None:
    assert names_of({"subjectAltName": (("DNS", "A.b"), ("URI", "spiffe://X/y"), ("IP Address", "10.0.0.1"))}) == {
        "a.b",
        "spiffe://X/y",
    }
    assert names_of(None) == names_of({}) == frozenset()
    context = stage.context(stage.clients.issue_cert("second.example"))
    async with stage.listening("first.example", "Second.Example"):
        assert (await stage.ask(context, COMPLETE)).startswith(b"HTTP/1.1 200 OK")


async def test_replaced_files_count_from_the_next_connection_on(stage: Stage) -> None:
    before, old = stage.ours, stage.context(stage.clients.issue_cert(CLIENT))
    async with stage.listening():
        assert (await stage.ask(old, COMPLETE)).startswith(b"HTTP/1.1 200 OK")
        stage.ours, stage.clients = trustme.CA(organization_name="after"), trustme.CA()
        stage.write()
        both = stage.context(stage.clients.issue_cert(CLIENT))
        assert (await stage.ask(both, COMPLETE)).startswith(b"HTTP/1.1 200 OK")
        assert "after" in (await stage.spoken(both))[2]
        before.configure_trust(both)
        stage.ours.configure_trust(old)
        assert await stage.ask(old, COMPLETE) == b""  # its CA is no longer believed
    assert len(stage.reached) == 2


async def test_a_bad_rotation_leaves_the_last_good_files_in_force(stage: Stage) -> None:
    context = stage.context(stage.clients.issue_cert(CLIENT))
    async with stage.listening() as served:
        good = served.current()
        stage.files.key.write_text("half a key")
        assert (await stage.ask(context, COMPLETE)).startswith(b"HTTP/1.1 200 OK")
        stage.files.cert.unlink()
        assert (await stage.ask(context, COMPLETE)).startswith(b"HTTP/1.1 200 OK")
        assert served.current() is good
        stage.write()
        assert (await stage.ask(context, COMPLETE)).startswith(b"HTTP/1.1 200 OK")
        assert served.current() is not good


@pytest.mark.parametrize("broken", ["cert", "key", "client_ca"])
async def test_files_that_cannot_be_used_stop_the_start_with_their_names(stage: Stage, broken: str) -> None:
    path: Path = getattr(stage.files, broken)
    for spoil in (lambda: path.write_text("nothing"), path.unlink):
        spoil()
        with pytest.raises(ConfigError, match=path.name):
            RotatingContext.of(stage.files)


async def test_a_key_with_a_passphrase_never_asks_at_the_terminal(stage: Stage, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - trustme brings it

    key = serialization.load_pem_private_key(stage.files.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    stage.files.key.write_bytes(key.private_bytes(*form, locked))
    with pytest.raises(ConfigError, match=r"tls\.key"):
        RotatingContext.of(stage.files)
