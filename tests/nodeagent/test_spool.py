"""What is kept on disk: in order, bounded, and whatever a crash or a bad disk left of it."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from nodeagent.spool import SYNC_US, Spool

S = 1_000_000


def body(number: int, size: int = 200) -> bytes:
    return f"{number}:".encode() + Random(number).randbytes(size)


def rest(spool: Spool) -> list[int]:
    found = []
    while (one := spool.peek()) is not None:
        found.append(int(one.split(b":")[0]))
        spool.done()
    return found


def test_first_in_first_out_and_gone_when_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(5):
        assert spool.put(number * S, body(number))
    assert spool.peek() == spool.peek() == body(0)
    spool.done()
    spool.put(5 * S, body(5))
    assert rest(spool) == [1, 2, 3, 4, 5]
    assert spool.peek() is None
    assert list(tmp_path.iterdir()) == []
    spool.put(6 * S, body(6))
    assert rest(spool) == [6]


def test_the_next_process_goes_on(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    for number in range(3):
        first.put(number * S, body(number))
    first.close()
    second = Spool(tmp_path)
    second.put(3 * S, body(3))
    assert rest(second) == [0, 1, 2, 3]


def test_it_stays_within_its_size_and_loses_the_oldest(tmp_path: Path) -> None:
    spool = Spool(tmp_path, size_max=16_000)
    for number in range(200):
        spool.put(number * S, body(number))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 16_000
    left = rest(spool)
    assert left == list(range(left[0], 200))
    assert 40 < len(left) < 80


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, size_max=16_000, age_us=60 * S)
    for number in range(30):
        spool.put(number * S, body(number))
    spool.put(200 * S, body(200))
    spool.put(201 * S, body(201))
    left = rest(spool)
    assert left[-2:] == [200, 201]
    assert len(left) < 10, "only what shares a file with something younger stays"


@pytest.mark.parametrize("cut", range(1, 240, 7))
def test_a_torn_end_loses_one_record(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path)
    for number in range(3):
        spool.put(number * S, body(number))
    spool.close()
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - min(cut, 200))
    assert rest(Spool(tmp_path)) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_never_gives_another_report(tmp_path: Path, seed: int) -> None:
    spool = Spool(tmp_path, size_max=8000)
    for number in range(12):
        spool.put(number * S, body(number))
    spool.close()
    rng = Random(seed)
    path = rng.choice(sorted(tmp_path.iterdir()))
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    again, found = Spool(tmp_path), []
    while (one := again.peek()) is not None:
        number = int(one.split(b":")[0])
        assert one == body(number)
        found.append(number)
        again.done()
    assert found == sorted(found)
    assert len(found) >= 8


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    spool = Spool(tmp_path)
    spool.put(S, body(1))
    assert rest(spool) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_it_syncs_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    synced: list[int] = []
    spool = Spool(tmp_path, sync=synced.append)
    for number in range(13):
        spool.put(SYNC_US + number * 5 * S, body(number))
    assert len(synced) == 3
    spool.close()
    assert len(synced) == 4


def test_a_broken_disk_loses_records_and_nothing_else(tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    spool = Spool(tmp_path, sync=full)
    assert not spool.put(SYNC_US, body(0))
    assert spool.lost > 0
    assert not spool.put(2 * SYNC_US, body(1))
    spool.close()


def test_a_record_that_went_while_it_was_under_way_is_not_counted_off_another(tmp_path: Path) -> None:
    spool = Spool(tmp_path, size_max=16_000)
    spool.put(0, body(0))
    assert spool.peek() == body(0)
    for number in range(1, 200):
        spool.put(number * S, body(number))
    spool.done()
    left = rest(spool)
    assert left == list(range(left[0], 200))
