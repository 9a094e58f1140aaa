"""The journal of MIG changes says after any death what it said before, or what was being added."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeagent.journal import CREATE, DESTROY, Change, Journal, JournalError

ONE, TWO = Change("GPU-a", CREATE, "1g.10gb", 6), Change("GPU-b", DESTROY, "3g.40gb", 0)


def loaded(path: Path) -> Journal:
    journal = Journal(path)
    journal.load()
    return journal


def said(journal: Journal) -> tuple[dict[str, tuple[Change, str]], dict[str, str]]:
    return journal.open, journal.settled


def test_what_was_said_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    journal.settle("GPU-a", "boot-1")
    journal.started(ONE, "boot-1")
    journal.started(TWO, "boot-1")
    journal.ended("GPU-a", "completed")
    expected = {"GPU-b": (TWO, "boot-1")}, {"GPU-a": "boot-1"}
    assert said(journal) == said(loaded(path)) == said(loaded(path)) == expected


def test_a_file_cut_anywhere_is_one_of_its_beginnings(tmp_path: Path) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    beginnings = [({}, {})]
    for record in (
        lambda: journal.settle("GPU-a", "boot-1"),
        lambda: journal.started(ONE, "boot-1"),
        lambda: journal.settle("GPU-a", "boot-2"),
    ):
        record()
        beginnings.append((dict(journal.open), dict(journal.settled)))
    body, seen = path.read_bytes(), []
    for end in range(len(body) + 1):
        path.write_bytes(body[:end])
        cut = loaded(path)
        seen.append(beginnings.index(said(cut)))
        cut.started(TWO, "boot-2")  # and whoever goes on from there is understood
        assert loaded(path).open["GPU-b"] == (TWO, "boot-2")
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}


def test_a_wrong_line_before_the_last_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    journal.started(ONE, "boot-1")
    journal.started(TWO, "boot-1")
    body = path.read_bytes()
    path.write_bytes(body[:20] + b"X" + body[21:])
    with pytest.raises(JournalError, match=r"line 1 of .* is damaged \(its checksum is wrong\); compare the MIG"):
        loaded(path)
    path.write_bytes(b"x" * (1 << 21))
    with pytest.raises(JournalError, match="not written by this program"):
        loaded(path)


def test_a_disk_that_fails_leaves_nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    journal.started(ONE, "boot-1")

    def fail(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(JournalError, match="No space left on device"):
            journal.ended("GPU-a", "completed")
    assert journal.open == {"GPU-a": (ONE, "boot-1")}
    path.write_bytes(path.read_bytes()[:-4])  # what the failed write left
    journal.started(TWO, "boot-1")
    assert said(loaded(path)) == said(journal) == ({"GPU-a": (ONE, "boot-1"), "GPU-b": (TWO, "boot-1")}, {})


def test_the_file_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    for number in range(600):
        journal.started(ONE, f"boot-{number}")
        journal.ended("GPU-a", "completed")
    assert len(path.read_bytes().splitlines()) <= 257


def test_each_record_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mig.journal"
    journal = loaded(path)
    synced: list[bytes] = []
    real = os.fsync

    def sync(file: int) -> None:
        real(file)
        synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", sync)
    journal.started(ONE, "boot-1")
    assert [b"started" in body for body in synced] == [True]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"nowhere.*make its folder writable"):
        loaded(tmp_path / "nowhere" / "mig.journal")
