"""How a process whose event loop stands still is told from one that only looks so. Its line is a real one,
the time is simulated; real processes are in tests/integration/test_hung_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from services.common.clock import ManualClock
from services.common.lifecycle.liveness import Line, Step, Watchdog, hear

#: The gateway's default.
LIMIT_S = 30.0
LONG_S = 24 * 3600.0
#: Questions that a child may leave without an answer, and nothing is said of it.
LESS = 28
QUIET = [Step.NOTHING, Step.NOTHING]


class Child:
    """What of a process matters here: it answers, unless its loop stands still or has not begun."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.started = True
        self.stands_still = False
        line.child_end.setblocking(False)

    def turn(self) -> None:
        if not self.stands_still:
            assert hear(self.line.child_end.fileno(), answering=self.started)


class Family:
    """Two children, and a parent that asks them."""

    def __init__(self, stack: ExitStack, limit_s: float) -> None:
        self.clock = ManualClock()
        self.watchdog = Watchdog(limit_s, self.clock.monotonic)
        self.children = [Child(stack.enter_context(Line())) for _ in range(2)]

    def ask(self, after_s: float | None = None) -> list[Step]:
        """The parent's loop runs `after_s` seconds after the last time, on time by default; then the
        children's do."""
        self.clock.advance(self.watchdog.every_s if after_s is None else after_s)
        steps = self.watchdog.ask([child.line for child in self.children])
        for child in self.children:
            child.turn()
        return steps

    def ask_until(self, step: Step, index: int) -> float:
        """Ask until it is said of child `index`, and nothing of the other one; seconds that it took."""
        began = self.clock.monotonic()
        while self.clock.monotonic() - began < 100 * LIMIT_S:
            steps = self.ask()
            assert steps[1 - index] is Step.NOTHING
            if steps[index] is not Step.NOTHING:
                assert steps[index] is step
                return self.clock.monotonic() - began
        raise AssertionError(f"never {step}")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as lines:
        yield lines


@pytest.fixture
def family(stack: ExitStack) -> Family:
    """Both children have answered."""
    made = Family(stack, LIMIT_S)
    assert [made.ask() for _ in range(3)] == [QUIET] * 3
    return made


@pytest.mark.parametrize("limit_s", [0.01, 0.7, 2.0, 4.9, LIMIT_S, 600.0])
def test_who_stands_still_shows_where_and_is_killed_once(stack: ExitStack, limit_s: float) -> None:
    family = Family(stack, limit_s)
    family.ask()
    family.children[0].stands_still = True
    every_s = family.watchdog.every_s
    shown_s = family.ask_until(Step.DUMP, 0)
    killed_s = shown_s + family.ask_until(Step.KILL, 0)
    # It answered what it was asked before it stood still, so that counting begins behind the next question.
    assert max(limit_s, 5 * every_s) < killed_s < max(limit_s, 5 * every_s) + 2.5 * every_s
    assert killed_s - shown_s == pytest.approx(every_s)
    assert limit_s <= family.watchdog.silent_s(family.children[0].line) < killed_s
    assert [family.ask() for _ in range(1000)] == [QUIET] * 1000


@pytest.mark.parametrize("limit_s", [0.01, 0.7, 2.0, LIMIT_S])
def test_a_child_is_asked_once_a_second_unless_the_limit_is_shorter_than_five(
    stack: ExitStack, limit_s: float
) -> None:
    assert Family(stack, limit_s).watchdog.every_s == pytest.approx(min(1.0, max(0.1, limit_s / 5)))


def test_a_child_that_starts_is_not_hung_however_long_it_takes(family: Family, stack: ExitStack) -> None:
    starting = family.children[0] = Child(stack.enter_context(Line()))
    starting.started = False  # its loop turns now and then
    for stands_still in (False, True, False):
        starting.stands_still = stands_still
        assert [family.ask() for _ in range(1000)] == [QUIET] * 1000
    starting.started = True
    family.ask()
    starting.stands_still = True
    family.ask_until(Step.DUMP, 0)


def test_a_child_that_stood_still_for_less_is_left_alone_each_time(family: Family) -> None:
    for _ in range(20):
        family.children[0].stands_still = True
        assert [family.ask() for _ in range(LESS)] == [QUIET] * LESS
        family.children[0].stands_still = False
        assert [family.ask() for _ in range(2)] == [QUIET] * 2


def test_one_that_comes_back_at_the_last_moment_lives(family: Family) -> None:
    family.children[0].stands_still = True
    family.ask_until(Step.DUMP, 0)
    family.children[0].stands_still = False
    family.children[0].turn()
    assert [family.ask() for _ in range(10)] == [QUIET] * 10
    family.children[0].stands_still = True  # and has all of its time again
    assert family.ask_until(Step.DUMP, 0) >= LIMIT_S - 1


@pytest.mark.parametrize("with_children", [False, True])
def test_a_parent_that_stood_still_kills_nobody(family: Family, with_children: bool) -> None:
    """Stopped alone, or the whole machine was; its children run a moment later than it does."""
    for _ in range(100):
        for child in family.children:
            child.stands_still = with_children
        assert family.ask(after_s=LONG_S) == QUIET
        for child in family.children:
            child.stands_still = False
        assert [family.ask() for _ in range(2)] == [QUIET] * 2


def test_time_in_which_the_parent_got_no_processor_does_not_count(family: Family) -> None:
    """On a machine that is far too busy the parent comes late each time, and its children not at all."""
    for child in family.children:
        child.stands_still = True
    assert [family.ask(after_s=1.6) for _ in range(1000)] == [QUIET] * 1000
    # What counted before counts on, and a little late is on time.
    began = family.clock.monotonic()
    while family.ask(after_s=1.4) == QUIET:
        assert family.clock.monotonic() - began < 2 * LIMIT_S
    assert family.clock.monotonic() - began > LIMIT_S - 2


def test_a_child_that_reads_nothing_does_not_hold_up_its_parent(family: Family) -> None:
    line = family.children[0].line
    assert line.answered()  # the last time
    for _ in range(100_000):
        line.ask()
    assert not line.answered()


def test_a_child_that_ended_has_not_answered(family: Family) -> None:
    line = family.children[0].line
    assert line.answered()  # the last time
    line.ask()
    line.child_end.close()
    assert not line.answered()
    line.ask()
    assert not line.answered()


@pytest.mark.parametrize("unread", [False, True])
def test_a_child_hears_that_its_parent_is_gone(unread: bool) -> None:
    """Also where that never read the last answers: the system then reports a reset first."""
    line = Line()
    child = line.child_end.dup()
    if unread:
        line.ask()
        assert hear(child.fileno(), answering=True)
    line.__exit__(None, None, None)
    with child:
        assert not hear(child.fileno(), answering=True)
