from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.ordering import MICRO
from scheduler.ledger.journal import line
from scheduler.ledger.lifecycle import HOLDING, TERMINAL, TRANSITIONS
from scheduler.ledger.spent import Spent
from scheduler.model.reservation import Entry, Event, State

HOUR = 3_600_000_000
WHOLE = (
    '{{"v":1,"id":"{0}","epoch":1,"fence":1,"node":"n","mode":"observed",'
    '"containers":{{"main":[{{"kind":"whole","count":{1}}}]}}}}'
)


def entry(at: int, request: str, event: Event, source: State | None, target: State, *, gpus: int = 2) -> Entry:
    allocation = WHOLE.format(request, gpus) if event in {Event.RESERVE, Event.ADOPT} else ""
    return Entry(
        at, request, "job", 1, 1, event, source, target, "n", f"q{len(request)}", "team", request,
        allocation=allocation, cpu_milli=1000,
    )  # fmt: skip


def life(request: str, start: int, end: int) -> list[Entry]:
    return [
        entry(start, request, Event.RESERVE, State.QUEUED, State.RESERVED),
        entry(start + 1, request, Event.ADOPT, State.RESERVED, State.BOUND),
        entry(end, request, Event.FINISH, State.BOUND, State.RELEASED),
    ]


def test_a_queue_comes_to_what_it_holds_and_forgets_it_by_halves() -> None:
    spent = Spent(HOUR)
    for one in life("a", 0, 2 * HOUR):
        spent.note(one)
    assert spent.used("q1", 2 * HOUR) == {"cpu": 750 * MICRO, "gpu": 3 * MICRO // 2}
    assert spent.used("q1", 3 * HOUR) == {"cpu": 375 * MICRO, "gpu": 3 * MICRO // 4}
    assert spent.used("q2", 3 * HOUR) == {}


def test_a_pod_found_bound_without_an_allocation_counts_the_gpus_it_asked() -> None:
    spent = Spent(HOUR)
    found = Entry(0, "a", "a", 1, 1, Event.ADOPT, None, State.BOUND, "n", "q", "team", "a", gpu_milli=4000)
    spent.note(found)
    assert spent.used("q", HOUR) == {"gpu": 2 * MICRO}


def integral(lives: list[tuple[int, int]], now: int) -> float:
    """The same by pieces of a minute, each counted with what is left of it."""
    step, total = HOUR // 60, 0.0
    for start, end in lives:
        for minute in range(start, min(end, now), step):
            length = min(step, end - minute, now - minute)
            total += 2 * (0.5 ** ((now - minute - length) / HOUR) - 0.5 ** ((now - minute) / HOUR))
    return total


@given(
    lives=st.lists(st.tuples(st.integers(0, 5 * HOUR), st.integers(2, 3 * HOUR)), max_size=5),
    after=st.integers(0, 3 * HOUR),
)
def test_usage_is_the_decayed_integral_of_what_was_held(lives: list[tuple[int, int]], after: int) -> None:
    spans = [(start, start + length) for start, length in lives]
    entries = sorted(
        (one for n, span in enumerate(spans) for one in life(str(n), *span)), key=lambda one: (one.at, one.request)
    )
    now = max((end for _, end in spans), default=0) + after
    spent, other, prev = Spent(HOUR), Spent(HOUR), "0" * 64
    for seq, one in enumerate(entries, start=1):
        spent.note(one)
        spent.used("q1", one.at)  # looking changes nothing
        made = line(one, seq, prev)
        other.note_line(made)
        prev = made["hash"]
    assert abs(spent.used("q1", now).get("gpu", 0) - integral(spans, now) * MICRO) <= 5 * len(entries) + 1
    assert other.used("q1", now) == spent.used("q1", now)


def test_every_way_out_of_holding_ends_the_count() -> None:
    for (source, event), target in TRANSITIONS.items():
        if source in HOLDING and target not in HOLDING:
            spent = Spent(HOUR)
            spent.note(entry(0, "a", Event.RESERVE, State.QUEUED, State.RESERVED))
            spent.note(entry(HOUR, "a", event, source, target))
            assert spent.used("q1", 2 * HOUR)["gpu"] == MICRO // 2, (source, event)
    assert TERMINAL.isdisjoint(HOLDING)
