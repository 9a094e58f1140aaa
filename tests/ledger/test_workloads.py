"""No allocate-reclaim cycle, over workloads: controllers make new pods for lost ones, and the budgets go with them."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.errors import ConflictError
from scheduler.ledger.journal import recompute_accounts, verify
from scheduler.ledger.ledger import Book, void_or_fail
from scheduler.ledger.lifecycle import ATTEMPTS_MAX, RECLAIMS_MAX, TERMINAL, TRANSITIONS, IllegalTransition
from scheduler.model.reservation import Event, Row, State
from scheduler.store.store import Store

from .lives import NOW, SECOND, born, step

JOBS = ("job-0", "job-1", "job-2")
jobs = st.sampled_from(JOBS)


class Workloads(RuleBasedStateMachine):
    """Three controllers with one pod each; users, nodes and Tessera do to them whatever the table allows."""

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

    @initialize()
    def start(self) -> None:
        for job in JOBS:
            self.create(job)

    @rule(job=jobs)
    def create(self, job: str) -> None:
        """Let the controller make a pod where it has none; the lineage goes on where a credit was left."""
        if job in self.pods:
            return
        self.born += 1
        self.pods[job] = f"pod-{self.born}"
        went_on = job in self.book.credits
        if not went_on:
            self.spent[job], self.arrival[job] = Counter(), self.now + 1
        template = born(self.pods[job], workload=job, arrival_us=self.now + 1, queue=f"queue-{job[-1]}")
        row = self.do(job, Event.SUBMIT, born=template)
        assert row.arrival_us == self.arrival[job], "a new pod keeps the place in line of the lost one"
        assert row.attempts == self.spent[job][Event.VOID]
        assert row.reclaims == self.spent[job][Event.RECLAIM]
        assert job not in self.book.credits

    @rule(job=jobs)
    def reserve(self, job: str) -> None:
        row = self.row(job)
        if row and row.state is State.QUEUED and row.not_before_us <= self.now + SECOND:
            self.do(job, Event.RESERVE, deadline_us=self.now + 120 * SECOND)

    @rule(job=jobs)
    def back_off_ends(self, job: str) -> None:
        row = self.row(job)
        self.now = max(self.now, row.not_before_us if row else 0)

    @rule(job=jobs)
    def bind(self, job: str) -> None:
        row = self.row(job)
        if row and row.state is State.RESERVED:
            self.do(job, Event.BIND)

    @rule(job=jobs)
    def post(self, job: str) -> None:
        row = self.row(job)
        if row and row.state is State.BINDING:
            self.do(job, Event.POST)

    @rule(job=jobs)
    def give_up(self, job: str) -> None:
        row = self.row(job)
        if row and row.state in {State.RESERVED, State.BINDING}:
            self.do(job, void_or_fail(row), reason="ReservationTimedOut")

    @rule(job=jobs)
    def run(self, job: str) -> None:
        row = self.row(job)
        if row and row.state is State.BOUND:
            self.do(job, Event.START)

    @rule(job=jobs)
    def reclaim(self, job: str) -> None:
        row = self.row(job)
        if row and row.state in {State.BOUND, State.RUNNING} and row.reclaims < RECLAIMS_MAX:
            self.do(job, Event.RECLAIM)

    @rule(job=jobs, evicted=st.booleans())
    def reclaiming_ends(self, job: str, evicted: bool) -> None:
        row = self.row(job)
        if row and row.state is State.RECLAIMING:
            self.do(job, Event.FINISH if evicted else Event.SPARE)
            if evicted:
                del self.pods[job]

    @rule(job=jobs)
    def pod_fails(self, job: str) -> None:
        row = self.row(job)
        if row and row.state in {State.BOUND, State.RUNNING, State.RECLAIMING}:
            self.do(job, Event.FAIL)
            del self.pods[job]

    @rule(job=jobs)
    def user_deletes(self, job: str) -> None:
        """End the lineage: what comes after is new work."""
        row = self.row(job)
        if row is None or row.state is State.RECLAIMING:
            return
        if row.state not in TERMINAL:
            bound = row.state in {State.BOUND, State.RUNNING}
            self.do(job, Event.FINISH if bound else Event.CANCEL)
        del self.pods[job]

    @rule(job=jobs)
    def found_bound(self, job: str) -> None:
        row = self.row(job)
        if row and row.state in {State.QUEUED, State.RESERVED, State.BINDING}:
            self.do(job, Event.ADOPT, node="gpu-9")

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
    @precondition(lambda self: self.pods)
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
        assert verify(self.store.journal()).ok

    @invariant()
    def budgets_hold(self) -> None:
        for spent in self.spent.values():
            assert spent[Event.VOID] < ATTEMPTS_MAX
            assert spent[Event.RECLAIM] <= RECLAIMS_MAX
            # Each reservation ends in a void, in a loss that left a credit, or is the present one.
            assert spent[Event.RESERVE] <= ATTEMPTS_MAX + RECLAIMS_MAX + spent[Event.FAIL]


TestWorkloads = Workloads.TestCase
TestWorkloads.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_the_whole_budget_of_a_workload_can_be_spent_and_no_more() -> None:
    machine = Workloads()
    machine.start()
    for _ in range(RECLAIMS_MAX):
        for done in (machine.reserve, machine.bind, machine.post, machine.reclaim):
            done("job-0")
        machine.reclaiming_ends("job-0", evicted=True)
        machine.create("job-0")
    for _ in range(ATTEMPTS_MAX):
        machine.back_off_ends("job-0")
        machine.reserve("job-0")
        machine.give_up("job-0")
        machine.budgets_hold()
    row = machine.row("job-0")
    assert row is not None
    assert (row.state, row.reclaims, machine.spent["job-0"][Event.RESERVE]) == (State.FAILED, 3, 8)
    machine.accounts_agree()
    machine.teardown()
