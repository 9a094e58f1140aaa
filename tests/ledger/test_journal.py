"""The hash chain: the published formula, and every kind of tampering found."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.ledger.journal import GENESIS, Line, digest, line, recompute_accounts, verify
from scheduler.model.reservation import Event, State

from .lives import history, step

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
values = st.one_of(st.none(), texts, st.integers(-(2**63), 2**64 - 1))


def journal() -> list[Line]:
    entries = [change.entry for name, state in zip("abcdefg", State, strict=False) for change in history(state, name)]
    lines: list[Line] = []
    prev = GENESIS
    for seq, entry in enumerate(entries, start=1):
        lines.append(line(entry, seq, prev))
        prev = lines[-1]["hash"]
    return lines


@given(st.dictionaries(texts, values, max_size=8))
def test_digest_is_the_published_formula(body: dict[str, int | str | None]) -> None:
    plain = {key: value for key, value in body.items() if key != "hash"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest({**body, "hash": "anything"}) == hashlib.sha256(text.encode()).hexdigest()


def test_a_line_has_the_keys_of_the_contract() -> None:
    first, second = journal()[:2]
    assert set("seq at request workload epoch fence event from to node prev hash".split()) <= first.keys()
    assert (first["seq"], first["prev"], first["from"], first["to"]) == (1, "0" * 64, None, "HELD")
    assert (second["seq"], second["prev"]) == (2, first["hash"])


def test_a_good_journal_verifies_whole_and_from_any_place() -> None:
    lines = journal()
    found = verify(lines)
    assert (found.ok, found.rows, found.first_bad, found.head) == (True, len(lines), None, lines[-1]["hash"])
    assert found.accounts == recompute_accounts(lines)
    for start in range(1, len(lines)):
        tail = verify(lines[start:], prev=lines[start - 1]["hash"], seq=start + 1)
        assert (tail.ok, tail.head) == (True, found.head)
    assert verify([]).head == GENESIS


def test_every_flipped_value_is_found_where_it_is() -> None:
    lines = journal()
    for place, good in enumerate(lines):
        for key, value in good.items():
            bad = dict(good)
            bad[key] = value + 1 if isinstance(value, int) else f"{value}x"
            found = verify([*lines[:place], bad, *lines[place + 1 :]])
            assert (found.ok, found.first_bad) == (False, place + 1), key


def test_every_missing_or_foreign_value_is_found() -> None:
    lines = journal()
    for key in lines[4]:
        for odd in (None, [], 1.5, True, 2**70):
            bad = {**lines[4], key: odd}
            if bad != lines[4]:
                assert verify([*lines[:4], bad]).first_bad == 5, (key, odd)
        assert verify([*lines[:4], {k: v for k, v in lines[4].items() if k != key}]).first_bad == 5


@pytest.mark.parametrize("seed", range(200))
def test_deleted_inserted_and_moved_rows_are_found(seed: int) -> None:
    rng, lines = random.Random(seed), journal()
    here = rng.randrange(len(lines) - 1)
    kind = rng.choice(["delete", "insert", "swap"])
    if kind == "delete":
        lines = lines[:here] + lines[here + 1 :]
    elif kind == "insert":
        lines.insert(here + 1, {**lines[here], "seq": here + 2, "prev": lines[here]["hash"]})
    else:
        there = rng.choice([n for n in range(len(lines)) if n != here])
        lines[here], lines[there] = lines[there], lines[here]
        here = min(here, there)
    found = verify(lines)
    assert not found.ok
    assert found.first_bad == here + (2 if kind == "insert" else 1)


def rehash(lines: list[Line]) -> list[Line]:
    prev = GENESIS
    for seq, row in enumerate(lines, start=1):
        row.update(seq=seq, prev=prev)
        row["hash"] = prev = digest(row)
    return lines


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        pytest.param({"to": "RUNNING"}, 2, id="no such edge"),
        pytest.param({"epoch": 2}, 2, id="epoch without a void"),
        pytest.param({"from": "HELD"}, 2, id="not where it was"),
        pytest.param({"event": "dance"}, 2, id="unknown event"),
        pytest.param({"fence": 0}, 2, id="fence goes back"),
    ],
)
def test_a_forged_chain_must_still_follow_the_table(change: dict[str, int | str], bad: int) -> None:
    lines = rehash([line(entry.entry, 1, GENESIS) for entry in history(State.RUNNING)])
    assert verify(lines).ok
    lines[1].update(change)
    assert verify(rehash(lines)).first_bad == bad


def test_epochs_grow_with_voids_and_new_lives() -> None:
    changes = history(State.BINDING)
    for event in (Event.VOID, Event.CANCEL):
        changes.append(step(changes[-1].after, event))
    changes.append(step(changes[-1].after, Event.ADOPT, born=changes[0].after))
    assert [change.after.epoch for change in changes] == [1, 1, 1, 2, 2, 3]
    assert verify(rehash([line(change.entry, 1, GENESIS) for change in changes])).ok
