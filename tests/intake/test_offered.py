"""Long lists of names are read from the bytes: just as the slow way reads them, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.intake import offered
from scheduler.intake.extender import BadBody, read_filter
from scheduler.intake.offered import Offered, part

POD = b'{"metadata":{"name":"p","namespace":"n","uid":"u"},"spec":{"containers":[{"name":"c"}]}}'
TAIL = b',"NodeNames":['


@pytest.fixture(autouse=True)
def _short_lists_too() -> Iterator[None]:
    with patch.object(offered, "BYTES_MIN", 0):
        yield


def body(names: bytes, pod: bytes = POD) -> bytes:
    return b'{"Pod":%b,"Nodes":null,"NodeNames":%b}' % (pod, names)


def told(sent: bytes) -> object:
    """Return what is read from a body, or the words of the refusal."""
    try:
        args = read_filter(sent)
    except BadBody as bad:
        return str(bad)
    return args.pod, list(args.names)


def told_slowly(sent: bytes) -> object:
    with patch("scheduler.intake.extender.part", lambda _: None):
        return told(sent)


def test_names_stay_bytes_until_they_are_asked_for() -> None:
    args = read_filter(body(b'["a","node-1","",","]'))
    assert isinstance(args.names, Offered)
    names = ["a", "node-1", "", ","]
    assert list(args.names) == names
    assert [args.names[index] for index in range(-4, 4)] == names * 2
    assert (len(args.names), args.names[1:3]) == (4, names[1:3])
    assert "node-1" in args.names
    assert "node" not in args.names
    assert dict.fromkeys(args.names, 1) == dict.fromkeys(names, 1)
    with pytest.raises(IndexError):
        args.names[4]


def test_short_lists_are_read_as_they_are() -> None:
    with patch.object(offered, "BYTES_MIN", 60):
        assert part(body(b'["a","b"]')) is None
        assert part(body(b'["a","b","%b"]' % (b"c" * 40))) is not None


ODD = [
    b"[]",
    b"null",
    b"[1]",
    b'["a",1]',
    b'["a","b]',
    b'["a",b"]',
    b'["a" ,"b"]',
    b'["a", "b"]',
    b'["a""b"]',
    b'["a","b",]',
    b'[,"a"]',
    b'["a"x"b"]',
    b'["a"xx"b","c"]',
    b'["a","b"],"More":["c"]',
    b'["a"],"NodeNames":["b","c"]',
    b'["a\\u0062"]',
    b'["a\\"]',
    b'["\xc3\xa9"]',
    b'["\xff"]',
    b'["a\x01b"]',
    b'["a\nb"]',
    b'["a b","c!"]',
    b'["a\x7f"]',
    b'["]}","["]',
    b'["a",["b"]]',
    b'["a"]}',
    b'["a"',
]


@pytest.mark.parametrize("names", ODD)
def test_odd_lists(names: bytes) -> None:
    assert told(body(names)) == told_slowly(body(names))


NESTED = b'{"metadata":{"name":"p","uid":"u","annotations":{"k":"v","NodeNames":["x","y"]}}}'
QUOTED = orjson.dumps({"metadata": {"name": "p", "uid": "u", "annotations": {"k": ',"NodeNames":["x"]}'}}})


@pytest.mark.parametrize("pod", [NESTED, QUOTED, b"null", b"[]", b'{"a":1', b'"', b'{"metadata":{"name":"\xff"}}', b""])
def test_whatever_stands_before(pod: bytes) -> None:
    sent = body(b'["a","b"]', pod)
    assert told(sent) == told_slowly(sent)
    for end in range(len(sent)):
        assert told(sent[:end]) == told_slowly(sent[:end])
        assert told(sent[end:]) == told_slowly(sent[end:])


def test_the_last_of_two_keys_counts() -> None:
    sent = b'{"NodeNames":7,"Pod":%b,"NodeNames":["a"]}' % POD
    assert isinstance(read_filter(sent).names, Offered)
    assert told(sent) == told_slowly(sent)


PIECES = st.sampled_from(
    [
        b'"',
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
        b":",
        b"\\",
        b" ",
        b"\n",
        b"a",
        b"null",
        b"\xff",
        TAIL,
        b'","',
        b'"a"',
        b'"]}',
        POD,
    ]
)
SOUP = st.lists(PIECES, max_size=12).map(b"".join)
WORDS = st.lists(st.text(max_size=6) | st.text("abc,]}[{ ", max_size=4), max_size=6)


@given(SOUP, SOUP)
@example(b'{"a":{"b":1', b"")
def test_any_pieces(before: bytes, behind: bytes) -> None:
    for sent in (before + TAIL + behind, b'{"Pod":' + POD + before + TAIL + b'"a"' + behind + b'"]}', before + behind):
        assert told(sent) == told_slowly(sent)


@given(WORDS, st.integers(0, 10_000), SOUP, st.integers(0, 3))
def test_real_bodies_and_what_becomes_of_them(names: list[str], at: int, piece: bytes, gone: int) -> None:
    sent = body(orjson.dumps(names))
    assert told(sent) == told_slowly(sent)
    at %= len(sent) + 1
    assert told(sent[:at] + piece + sent[at + gone :]) == told_slowly(sent[:at] + piece + sent[at + gone :])


@given(st.lists(st.text(st.characters(min_codepoint=0x23, max_codepoint=0x7E, exclude_characters="\\")), min_size=1))
def test_plain_names_are_left_in_their_bytes(names: list[str]) -> None:
    parted = part(body(orjson.dumps(names)))
    assert parted is not None
    head, found = parted
    assert head == body(b"null")
    assert list(found) == [found[index] for index in range(len(found))] == names
