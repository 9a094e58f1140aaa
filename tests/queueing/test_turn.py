"""The turn against an obvious loop that computes everything anew before each decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import BoolArray
from policies.ordering import MICRO, queue_rank, share_milli
from scheduler.ledger.quota import Quota, Usage, charge, entitled, exceeding, grow, lacking, would_borrow
from scheduler.model.queue import Queue
from scheduler.queueing import turn as turning
from scheduler.queueing.turn import Amounts, Barrier, Decision, Turn, Unit, barrier_for

MODELS = ("H100", "T4")
NAMES = ("a", "b", "c", "d")
CAPACITY = {"gpu": 12, "cpu": 30}
Refuses = Callable[[Amounts], bool]


@dataclass
class Machine:
    """One node: how many GPUs of which model."""

    model: str
    size: int
    free: int


@dataclass
class Ask:
    """One request: GPUs, and which model it wants; empty = any."""

    gpus: int
    model: str = ""


def charged(ask: Ask, model: str) -> dict[str, int]:
    return {"cpu": 1, **({"gpu": ask.gpus, model: ask.gpus} if ask.gpus else {})}


@dataclass
class Yard:
    """Machines and what stands on them; it can do all that a turn asks of the cluster."""

    quota: Quota
    usage: Usage
    machines: list[Machine]
    asks: dict[str, Ask]
    gone: set[str] = field(default_factory=set)
    placed: list[tuple[str, int]] = field(default_factory=list)

    def waits(self, unit: Unit) -> bool:
        return not self.gone & set(unit.members)

    def could(self, unit: Unit) -> BoolArray:
        found = np.zeros(len(self.machines), np.bool_)
        for member in unit.members:
            ask = self.asks[member]
            could = [one.size >= ask.gpus and ask.model in {"", one.model} for one in self.machines]
            found |= np.array(could, np.bool_)
        return found

    def awaited(self, unit: Unit) -> bool:
        return False

    def place(self, unit: Unit, barrier: Barrier | None) -> Amounts | None:
        open_ = None if barrier is None else barrier.open
        owed = {} if barrier is None else barrier.owed
        return self.take(unit, open_, lambda needs: bool(self.lacks(unit.queue, needs, owed)))

    def lacks(self, queue: str, needs: Amounts, owed: Amounts) -> Amounts:
        return lacking(self.quota, self.usage, queue, turning.owing(needs, owed))

    def take(self, unit: Unit, open_: BoolArray | None, refuses: Refuses) -> Amounts | None:
        frees, usage, done = [one.free for one in self.machines], self.usage.copy(), len(self.placed)
        total: dict[str, int] = {}
        for member in unit.members:
            ask = self.asks[member]
            for at, one in enumerate(self.machines):
                needs = charged(ask, one.model)
                fits = one.free >= ask.gpus and ask.model in {"", one.model} and (open_ is None or open_[at])
                if fits and not refuses(needs):
                    one.free -= ask.gpus
                    charge(self.quota, self.usage, unit.queue, needs)
                    self.placed.append((member, at))
                    total = {key: total.get(key, 0) + needs.get(key, 0) for key in {**total, **needs}}
                    break
            else:
                for one, free in zip(self.machines, frees, strict=True):
                    one.free = free
                self.usage.held, self.usage.counted = usage.held, usage.counted
                del self.placed[done:]
                return None
        return total

    def unit(self, queue: str, number: int, asks: Sequence[Ask], priority: int = 0) -> Unit:
        members = tuple(f"{queue}{number}.{at}" for at in range(len(asks)))
        self.asks |= dict(zip(members, asks, strict=True))
        least: dict[str, int] = {}
        most: dict[str, int] = {}
        for ask in asks:
            could = [one.model for one in self.machines if one.size >= ask.gpus and ask.model in {"", one.model}]
            wholes = [charged(ask, model) for model in could or MODELS]
            keys = {key for whole in wholes for key in whole}
            for key in keys:
                least[key] = least.get(key, 0) + min(whole.get(key, 0) for whole in wholes)
                most[key] = most.get(key, 0) + max(whole.get(key, 0) for whole in wholes)
        kind = tuple((ask.gpus, ask.model) for ask in asks)
        return Unit(queue, (-priority, number, "default", members[0]), kind, members, least, most)


Story = list[tuple[tuple[str, ...], str]]
Used = dict[str, Amounts]
Day = tuple[Yard, Yard, list[Unit], Used]


def told(decisions: Sequence[Decision]) -> Story:
    return [(one.unit.members, "granted" if one.granted is not None else one.word) for one in decisions]


def next_unit(yard: Yard, units: Sequence[Unit], granted: dict[str, dict[str, int]], used: Used) -> Unit | None:
    """Return the head of the queue that is next, every rank made anew."""
    heads: dict[str, Unit] = {}
    for unit in sorted(units, key=lambda unit: unit.rank):
        heads.setdefault(unit.queue, unit)
    ranks = []
    for name, unit in heads.items():
        both = Counter({key: amount * MICRO for key, amount in granted.get(name, {}).items()})
        both.update(used.get(name, {}))
        share = share_milli(both, entitled(yard.quota, name, CAPACITY), yard.quota.queues[name].weight)
        borrows = would_borrow(yard.quota, yard.usage, name, unit.least)
        ranks.append(queue_rank(borrows=borrows, share=share, name=name))
    return heads[min(ranks)[-1]] if ranks else None


def fate_of(yard: Yard, unit: Unit, ahead: Sequence[Unit]) -> tuple[Amounts | None, str]:
    """Decide one unit behind these blocked ones, whose needs are charged on a copy."""
    quota = yard.quota

    def refuses(needs: Amounts) -> bool:
        virtual = yard.usage.copy()
        for one in ahead:
            charge(quota, virtual, one.queue, one.most)
        return bool(lacking(quota, virtual, unit.queue, needs))

    if exceeding(quota, unit.queue, unit.least):
        return None, "ExceedsQuotaLimit"
    if lacking(quota, yard.usage, unit.queue, unit.least):
        return None, "WaitingForQuota"
    open_ = np.ones(len(yard.machines), np.bool_)
    for one in ahead:
        open_ &= ~yard.could(one)
    got = None if refuses(unit.least) else yard.take(unit, open_, refuses)
    return got, "granted" if got is not None else "WaitingBehindPriority" if ahead else "WaitingForCapacity"


def obvious(yard: Yard, units: Sequence[Unit], used: Used) -> Story:
    """Decide one after the other; nothing is kept from one decision to the next but what was decided."""
    story: Story = []
    blocked: list[Unit] = []
    granted: dict[str, dict[str, int]] = {}
    left = list(units)
    while (unit := next_unit(yard, left, granted, used)) is not None:
        left.remove(unit)
        if not yard.waits(unit):
            story.append((unit.members, ""))
            continue
        got, word = fate_of(yard, unit, [one for one in blocked if one.queue == unit.queue])
        if got is None and word != "ExceedsQuotaLimit" and yard.could(unit).any():
            blocked.append(unit)
        mine = granted.setdefault(unit.queue, {})
        for key, amount in (got or {}).items():
            mine[key] = mine.get(key, 0) + amount
        story.append((unit.members, word))
    return story


limit = st.one_of(st.none(), st.integers(0, 6))


def limits(keys: Sequence[str]) -> st.SearchStrategy[dict[str, int]]:
    return st.tuples(*(limit for _ in keys)).map(
        lambda found: {key: amount for key, amount in zip(keys, found, strict=True) if amount is not None}
    )


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    keys = ("gpu", "cpu", "H100")
    made = []
    for at, name in enumerate(NAMES[: draw(st.integers(1, len(NAMES)))]):
        parent = draw(st.sampled_from(["", *NAMES[:at]]))
        limited = draw(st.booleans())
        own, borrow, lend = (draw(limits(keys)) if limited else {} for _ in range(3))
        made.append(Queue(name, parent, draw(st.integers(1, 3)), own, borrow, lend))
    return grow(made)


@st.composite
def days(draw: st.DrawFn) -> Day:
    quota = draw(quotas())
    before = {name: draw(st.integers(0, 2)) for name in quota.queues}
    sizes = draw(st.lists(st.tuples(st.sampled_from(MODELS), st.integers(0, 4), st.integers(0, 2)), max_size=4))
    yards = []
    for _ in range(2):
        usage = Usage()
        for name, amount in before.items():
            charge(quota, usage, name, {"gpu": amount})
        machines = [Machine(model, size, max(size - taken, 0)) for model, size, taken in sizes]
        yards.append(Yard(quota, usage, machines, {}))
    ask = st.builds(Ask, st.integers(0, 3), st.sampled_from(["", *MODELS]))
    drawn = st.tuples(
        st.sampled_from(sorted(quota.queues)), st.lists(ask, min_size=1, max_size=3), st.integers(0, 1), st.booleans()
    )
    units = []
    for number, (queue, asks, priority, gone) in enumerate(draw(st.lists(drawn, max_size=9))):
        for yard in yards:
            unit = yard.unit(queue, number, asks if priority else asks[:1], priority)
            if gone and number % 3 == 0:
                yard.gone.add(unit.members[0])
        units.append(unit)
    used: Used = {name: {"gpu": draw(st.integers(0, 3 * MICRO))} for name in quota.queues}
    return yards[0], yards[1], units, used


@settings(max_examples=400, deadline=None)
@given(day=days())
def test_a_turn_decides_as_the_obvious_loop_does(
    day: Day,
) -> None:
    mine, theirs, units, used = day
    turn = Turn(units, mine.quota, mine.usage, mine, used=used, capacity=CAPACITY)
    decisions = []
    while (decision := turn.step()) is not None:
        decisions.append(decision)
    expected = obvious(theirs, units, used)
    aside = {unit.members for unit in turn.undecided()}
    assert [one for one in told(decisions) if one[1] == "granted"] == [one for one in expected if one[1] == "granted"]
    assert dict(told(decisions)).items() <= dict(expected).items()
    assert mine.placed == theirs.placed
    assert mine.usage == theirs.usage
    assert {members for members, _ in expected} == {one.unit.members for one in decisions} | aside


@settings(max_examples=200, deadline=None)
@given(day=days())
def test_barriers_say_of_everybody_behind_what_a_turn_would(
    day: Day,
) -> None:
    yard, _, units, _ = day
    turn = Turn(units, yard.quota, yard.usage, yard)
    blocked: dict[str, list[Unit]] = {}
    while (decision := turn.step()) is not None:
        word = decision.word
        if word and word != "ExceedsQuotaLimit" and yard.could(decision.unit).any():
            blocked.setdefault(decision.unit.queue, []).append(decision.unit)
    barriers = turn.barriers(len(yard.machines))
    assert barriers.keys() == blocked.keys()
    for name, heads in blocked.items():
        for unit in (one for one in units if one.queue == name):
            before = [one for one in heads if one.rank < unit.rank]
            barrier = barrier_for(barriers[name], unit.rank)
            assert (barrier is None) == (not before)
            if barrier is not None:
                assert not (barrier.open & np.any([yard.could(one) for one in before], axis=0)).any()
                assert barrier.open.sum() == len(yard.machines) - np.any([yard.could(b) for b in before], axis=0).sum()
                for key in yard.quota.keys(name):
                    assert barrier.owed.get(key, 0) == sum(one.most.get(key, 0) for one in before)


def yard_of(*machines: Machine, queues: Sequence[Queue] = (Queue("a"),)) -> Yard:
    return Yard(grow(queues), Usage(), list(machines), {})


def run(yard: Yard, *units: Unit, used: Used | None = None, capacity: Amounts | None = None) -> list[str]:
    turn = Turn(units, yard.quota, yard.usage, yard, used=used, capacity=capacity)
    decisions = []
    while (decision := turn.step()) is not None:
        decisions.append(decision)
    return [f"{one.unit.members[0]} {one.word}".strip() for one in decisions]


def test_who_is_behind_may_have_what_the_first_could_never_use() -> None:
    yard = yard_of(Machine("H100", 8, 2), Machine("T4", 2, 2))
    first, second, third = (
        yard.unit("a", 0, [Ask(4)]),
        yard.unit("a", 1, [Ask(1, "H100")]),
        yard.unit("a", 2, [Ask(2, "T4")]),
    )
    assert run(yard, first, second, third) == ["a0.0 WaitingForCapacity", "a1.0 WaitingBehindPriority", "a2.0"]


def test_another_queue_is_not_held_up() -> None:
    yard = yard_of(Machine("H100", 8, 2), queues=[Queue("a"), Queue("b")])
    units = yard.unit("a", 0, [Ask(4)]), yard.unit("b", 1, [Ask(2)])
    assert run(yard, *units) == ["a0.0 WaitingForCapacity", "b1.0"]


def test_a_queue_gets_its_own_before_another_borrows() -> None:
    queues = [Queue("root"), Queue("a", "root", nominal={"gpu": 2}), Queue("b", "root", nominal={"gpu": 4})]
    yard = yard_of(Machine("H100", 8, 8), queues=queues)
    charge(yard.quota, yard.usage, "a", {"gpu": 2})
    units = yard.unit("a", 0, [Ask(2)]), yard.unit("b", 1, [Ask(4)])
    assert run(yard, *units) == ["b1.0", "a0.0 WaitingForQuota"]


def test_the_queue_that_was_served_less_is_next_and_each_grant_counts() -> None:
    yard = yard_of(Machine("H100", 8, 8), queues=[Queue("a"), Queue("b", weight=2)])
    units = [yard.unit(name, number, [Ask(1)]) for number in range(4) for name in "ab"]
    order = run(yard, *units, used={"a": {}, "b": {}}, capacity={"gpu": 8})
    assert order == ["a0.0", "b0.0", "b1.0", "a1.0", "b2.0", "b3.0", "a2.0", "a3.0"]


def test_what_fits_on_no_node_is_asked_once_for_all_of_its_kind() -> None:
    yard = yard_of(Machine("H100", 8, 1), queues=[Queue(f"q{number}") for number in range(5)])
    asked = []
    place = yard.place

    def counting(unit: Unit, barrier: Barrier | None) -> Amounts | None:
        asked.append(unit)
        return place(unit, barrier)

    yard.place = counting  # type: ignore[method-assign]
    run(yard, *(yard.unit(f"q{at % 5}", at, [Ask(4)]) for at in range(1000)))
    assert len(asked) == 1


def test_a_queue_full_of_different_hopeless_asks_is_set_aside() -> None:
    yard = yard_of(Machine("H100", 2000, 0), Machine("T4", 1, 1))
    units = [yard.unit("a", number, [Ask(1000 - number)]) for number in range(turning.HEADS_MAX)]
    last = yard.unit("a", 2000, [Ask(1, "T4")])
    assert run(yard, *units[:-1], last)[-1] == "a2000.0"
    yard.machines[1].free = 1
    assert len(run(yard, *units, last)) == turning.HEADS_MAX


def test_who_could_run_nowhere_blocks_nobody() -> None:
    queues = [Queue("a", nominal={"gpu": 4}, borrow_limit={"gpu": 0})]
    yard = yard_of(Machine("H100", 4, 4), queues=queues)
    units = yard.unit("a", 0, [Ask(2, "T4")]), yard.unit("a", 1, [Ask(5)]), yard.unit("a", 2, [Ask(4)])
    assert run(yard, *units) == ["a0.0 WaitingForCapacity", "a1.0 ExceedsQuotaLimit", "a2.0"]


def test_a_gang_gets_all_or_nothing() -> None:
    yard = yard_of(Machine("H100", 2, 2), Machine("H100", 2, 1))
    gang, single = yard.unit("a", 0, [Ask(2), Ask(2)]), yard.unit("a", 1, [Ask(1)])
    assert run(yard, gang, single) == ["a0.0 WaitingForCapacity"]
    assert [one.free for one in yard.machines] == [2, 1]
    assert not yard.usage.held
    yard.machines[1].free = 2
    assert run(yard, gang, single)[0] == "a0.0"
    assert yard.placed == [("a0.0", 0), ("a0.1", 1)]


def test_quota_that_the_first_waits_for_is_left_to_it() -> None:
    queues = [Queue("a", nominal={"gpu": 4})]
    yard = yard_of(Machine("H100", 8, 8), Machine("T4", 8, 8), queues=queues)
    charge(yard.quota, yard.usage, "a", {"gpu": 2})
    units = yard.unit("a", 0, [Ask(3, "H100")]), yard.unit("a", 1, [Ask(1, "T4")])
    assert run(yard, *units) == ["a0.0 WaitingForQuota", "a1.0 WaitingBehindPriority"]


def test_a_member_that_left_holds_nobody_up() -> None:
    yard = yard_of(Machine("H100", 8, 2))
    first, second = yard.unit("a", 0, [Ask(4)]), yard.unit("a", 1, [Ask(2)])
    yard.gone.add("a0.0")
    assert run(yard, first, second) == ["a0.0", "a1.0"]
    assert yard.placed == [("a1.0", 0)]
