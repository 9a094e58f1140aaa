"""No allocate-reclaim cycle, over workloads: controllers make new pods for lost ones, and the budgets go with them."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.errors import ConflictError
from scheduler.ledger.journal import recompute_accounts
from scheduler.ledger.ledger import Book, void_or_fail
from scheduler.ledger.lifecycle import ATTEMPTS_MAX, RECLAIMS_MAX, TERMINAL, TRANSITIONS, IllegalTransition
from scheduler.model.reservation import Event, Row, State
from scheduler.store.store import Store

from .lives import NOW, SECOND, born, step

JOBS = ("job-0", "job-1")
jobs = st.sampled_from(JOBS)

MOVES: dict[State | None, list[str]] = {
    None: ["create"],
    State.QUEUED: ["reserve"] * 6 + ["adopt"] * 3 + ["delete"],
    State.RESERVED: ["give_up"] * 4 + ["bind"] * 3 + ["adopt"] * 2 + ["delete"],
    State.BINDING: ["give_up"] * 4 + ["post"] * 4 + ["adopt", "delete"],
    State.BOUND: ["reclaim"] * 5 + ["run", "fail"] * 2 + ["delete"],
    State.RUNNING: ["reclaim"] * 6 + ["fail"] * 3 + ["delete"],
    State.RECLAIMING: ["evict"] * 6 + ["spare"] * 2 + ["fail"],
    **{state: ["delete"] for state in TERMINAL},
}
"""What can happen to a workload whose pod is in this state; None = the controller has to make one."""


class Workloads(RuleBasedStateMachine):
    """Two controllers with one pod each; users, nodes and Tessera do to them whatever the table allows."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store.open("sqlite://")
        self.book = Book()
        self.now = NOW
        self.born = 0
        self.pods: dict[str, str] = {}  # job -> id of its present pod
        self.arrival: dict[str, int] = {}  # of the lineage
        self.spent: dict[str, Counter[Event]] = {}  # events of the lineage: pods joined by credits

    def teardown(self) -> None:
        found = self.store.verify()
        assert found.ok, found.text
        self.store.close()

    def row(self, job: str) -> Row | None:
        return self.book.rows.get(self.pods.get(job, ""))

    def do(self, job: str, event: Event, **given: object) -> Row:
        row = self.row(job)
        self.now += SECOND
        credit = self.book.credits.get(job)
        change = step(row, event, now_us=self.now, fence=self.store.fence, credit=credit, **given)
        self.book.apply((change,))
        assert self.store.commit([(change,)]) == [None]
        self.spent[job][event] += 1
        return change.after

    @rule(job=jobs, choice=st.integers(0, 59))
    def something_happens(self, job: str, choice: int) -> None:
        """Let one of the things happen that can happen to this workload now."""
        row = self.row(job)
        moves = MOVES[row.state if row else None]
        getattr(self, moves[choice % len(moves)])(job)

    def create(self, job: str) -> None:
        """Let the controller make a pod; the lineage goes on where a credit was left."""
        self.born += 1
        self.pods[job] = f"pod-{self.born}"
        if job not in self.book.credits:
            self.spent[job], self.arrival[job] = Counter(), self.now + 1
        template = born(self.pods[job], workload=job, arrival_us=self.now + 1, queue=f"queue-{job[-1]}")
        row = self.do(job, Event.SUBMIT, born=template)
        assert row.arrival_us == self.arrival[job], "a new pod keeps the place in line of the lost one"
        assert job not in self.book.credits

    def reserve(self, job: str) -> None:
        self.now = max(self.now, self.book.rows[self.pods[job]].not_before_us)
        self.do(job, Event.RESERVE, deadline_us=self.now + 120 * SECOND)

    def bind(self, job: str) -> None:
        self.do(job, Event.BIND)

    def post(self, job: str) -> None:
        self.do(job, Event.POST)

    def give_up(self, job: str) -> None:
        row = self.row(job)
        assert row is not None
        self.do(job, void_or_fail(row), reason="ReservationTimedOut")

    def run(self, job: str) -> None:
        self.do(job, Event.START)

    def reclaim(self, job: str) -> None:
        row = self.row(job)
        assert row is not None
        if row.reclaims < RECLAIMS_MAX:
            self.do(job, Event.RECLAIM)

    def spare(self, job: str) -> None:
        self.do(job, Event.SPARE)

    def evict(self, job: str) -> None:
        self.do(job, Event.FINISH)
        del self.pods[job]

    def fail(self, job: str) -> None:
        self.do(job, Event.FAIL)
        del self.pods[job]

    def adopt(self, job: str) -> None:
        self.do(job, Event.ADOPT, node="gpu-9")

    def delete(self, job: str) -> None:
        """Let the user delete the pod; what comes after is new work."""
        row = self.row(job)
        assert row is not None
        if row.state not in TERMINAL:
            bound = row.state in {State.BOUND, State.RUNNING}
            self.do(job, Event.FINISH if bound else Event.CANCEL)
        del self.pods[job]

    @rule(job=jobs, event=st.sampled_from(list(Event)))
    def illegal_events_change_nothing(self, job: str, event: Event) -> None:
        row = self.row(job)
        if row is None or row.state in TERMINAL or (row.state, event) in TRANSITIONS:
            return
        try:
            step(row, event)
        except IllegalTransition:
            return
        raise AssertionError(f"{row.state} took {event}")

    @rule(job=jobs)
    def a_commit_fails(self, job: str) -> None:
        row = self.row(job)
        if row is None or row.state is not State.QUEUED:
            return
        rows, credits_ = dict(self.book.rows), dict(self.book.credits)
        change = step(row, Event.CANCEL, now_us=self.now, fence=self.store.fence + 1)
        self.book.apply((change,))
        assert isinstance(self.store.commit([(change,)])[0], ConflictError)
        self.book.revert((change,))
        assert (self.book.rows, self.book.credits) == (rows, credits_)

    @rule()
    def restart(self) -> None:
        self.store.raise_fence()
        assert self.store.load() == (self.book.rows, self.book.credits)
        self.book = Book(*self.store.load())

    @invariant()
    def accounts_agree(self) -> None:
        assert self.book.accounts() == self.store.accounts() == recompute_accounts(self.store.journal())

    @invariant()
    def budgets_hold(self) -> None:
        for job, spent in self.spent.items():
            row = self.row(job)
            if row is not None:
                assert (row.attempts, row.reclaims) == (spent[Event.VOID], spent[Event.RECLAIM])
            assert spent[Event.VOID] < ATTEMPTS_MAX
            assert spent[Event.RECLAIM] <= RECLAIMS_MAX
            # Each reservation ends in a void, in a loss that left a credit, or is the present one.
            assert spent[Event.RESERVE] <= ATTEMPTS_MAX + RECLAIMS_MAX + spent[Event.FAIL]


TestWorkloads = Workloads.TestCase
TestWorkloads.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_the_whole_budget_of_a_workload_can_be_spent_and_no_more() -> None:
    machine = Workloads()
    for _ in range(RECLAIMS_MAX):
        for move in "create reserve give_up reserve bind post reclaim evict".split():
            getattr(machine, move)("job-0")
    machine.create("job-0")
    for move in "reserve give_up reserve bind give_up".split():
        getattr(machine, move)("job-0")
        machine.budgets_hold()
    row = machine.row("job-0")
    assert row is not None
    assert (row.state, row.reclaims, machine.spent["job-0"][Event.RESERVE]) == (State.FAILED, 3, 8)
    machine.accounts_agree()
    machine.teardown()
