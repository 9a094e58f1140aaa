"""kube-scheduler's port in trouble: many requests that are refused, and work after a reply that fails."""

from __future__ import annotations

from structlog.testing import capture_logs

from scheduler.web.http1 import Listener, Route
from tests.web.test_http1 import Port, Wire, post, settled, until


async def test_many_refused_requests_of_one_read_take_little_memory() -> None:
    port = Port()
    connection = Listener({"/wait": Route("POST", port.wait)}, 100)()
    connection.connection_made(Wire())
    connection.data_received(post("/wait") + b"GET / HTTP/1.1\r\n\r\n" * 1000)
    assert len(connection._calls) == 1000
    assert len({id(call.refusal) for call in connection._calls}) == 1
    port.gate.set()
    await until(lambda: not connection._calls)
    connection.connection_lost(None)


async def test_a_failure_after_a_reply_costs_nobody_a_reply() -> None:
    told: list[bytes] = []

    def after() -> None:
        told.append(b"after")
        raise ZeroDivisionError

    connection = Listener({"/echo": Route("POST", lambda body: (200, body), after=after)}, 100)()
    connection.connection_made(Wire(told))
    with capture_logs() as logs:
        connection.data_received(post("/echo", b"1") + post("/echo", b"2"))
        await settled(connection)
    assert [one.split()[0] for one in told] == [b"HTTP/1.1", b"after"] * 2
    assert [line["event"] for line in logs] == ["http.failed_after"] * 2
    connection.connection_lost(None)
