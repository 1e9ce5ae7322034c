"""Ejection: who is left out, for how long, and how it comes back. Time is given."""

from __future__ import annotations

import pytest
from headrace.v1.tensor_pb2 import Code
from hypothesis import given
from hypothesis import strategies as st

from services.router.outliers import OutlierPolicy, Outliers, State, Verdict, verdict

FAILED, ANSWERED, NOTHING = Verdict.FAILED, Verdict.ANSWERED, Verdict.NOTHING
NAMES = tuple("abcdefghij")


def room(count: int = 10, **policy: float) -> Room:
    return Room(NAMES[:count], OutlierPolicy(**policy))  # type: ignore[arg-type]


class Room:
    """Outliers among named endpoints."""

    def __init__(self, ready: tuple[str, ...], policy: OutlierPolicy) -> None:
        self.ready = ready
        self.outliers: Outliers[str] = Outliers(policy)

    def say(self, endpoint: str, *said: Verdict, at: float = 0.0, sent: float | None = None) -> list[bool]:
        sent_at = at if sent is None else sent
        return [self.outliers.judge(endpoint, v, len(self.ready), sent_at, at) for v in said]

    @property
    def out(self) -> set[str]:
        return set(self.ready) - set(self.outliers.offered(self.ready)[0])


def test_five_errors_in_a_row_eject_and_four_do_not() -> None:
    r = room()
    assert r.say("a", *[FAILED] * 4, ANSWERED, *[FAILED] * 4) == [False] * 9
    assert r.out == set()
    assert r.say("a", NOTHING, FAILED) == [False, True]
    assert r.out == {"a"}
    assert r.outliers.ejected_total == 1


def test_a_healthy_version_has_nothing_on_record() -> None:
    r = room()
    r.say("a", ANSWERED, NOTHING)
    assert not r.outliers.breakers


def test_switched_off() -> None:
    r = room(consecutive=0)
    r.say("a", *[FAILED] * 50)
    assert r.out == set()


@pytest.mark.parametrize(
    ("count", "share", "allowed"), [(2, 0.1, 1), (10, 0.1, 1), (10, 0.35, 3), (3, 0.0, 1)]
)
def test_no_more_than_the_share_and_one_always_may(count: int, share: float, allowed: int) -> None:
    r = room(count, share=share)
    for name in r.ready:
        r.say(name, *[FAILED] * 5)
    assert len(r.out) == allowed
    assert r.outliers.spared_total == count - allowed


def test_who_is_spared_counts_its_errors_anew() -> None:
    r = room()
    r.say("a", *[FAILED] * 5)
    r.say("b", *[FAILED] * 9)
    assert r.outliers.spared_total == 1
    r.say("b", FAILED)
    assert r.outliers.spared_total == 2


def test_errors_in_a_row_are_not_forgotten_by_the_sweep() -> None:
    r = room()
    r.say("a", *[FAILED] * 4)
    for now in (0, 10, 20):
        r.outliers.sweep(now)
    assert r.say("a", FAILED, at=21) == [True]
    assert r.outliers.breakers["a"].until == 21 + 30


def test_errors_of_one_that_is_out_and_serves_are_no_further_ejection() -> None:
    r = room(1)
    r.say("a", *[FAILED] * 5)
    r.say("a", *[FAILED] * 10, at=5)
    assert (r.outliers.ejected_total, r.outliers.spared_total) == (1, 0)
    assert r.outliers.breakers["a"].until == 30


@pytest.mark.parametrize(("said", "state"), [(ANSWERED, State.CLOSED), (FAILED, State.OPEN)])
def test_one_that_is_judged_before_its_probe_is_not_tried_any_more(said: Verdict, state: State) -> None:
    r = room(1)  # so it serves meanwhile
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(30)
    r.say("a", said, at=31)
    assert r.outliers.breakers["a"].state is state
    assert r.outliers.probe(r.ready, ()) is None


def test_one_that_does_not_have_the_version_is_no_probe() -> None:
    r = room(3)
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(30)
    assert r.outliers.probe(("b", "c"), ()) is None
    assert r.outliers.probe(r.ready, ()) == "a"


def test_the_only_endpoint_goes_on_serving_and_is_said_to_be_broken() -> None:
    r = room(1)
    r.say("a", *[FAILED] * 5)
    assert r.outliers.offered(r.ready) == (("a",), True)
    assert r.say("a", ANSWERED, at=3) == [True]
    assert r.outliers.offered(r.ready) == (("a",), False)


def test_when_the_healthy_ones_leave_the_ejected_one_serves() -> None:
    r = room(2)
    r.say("a", *[FAILED] * 5)
    assert r.outliers.offered(("a", "b")) == (("b",), False)
    assert r.outliers.offered(("a",)) == (("a",), True)
    assert r.outliers.offered(()) == ((), False)


def test_one_probe_brings_it_back() -> None:
    r = room()
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(29.9)
    assert r.outliers.probe(r.ready, ()) is None
    r.outliers.sweep(30)
    assert r.outliers.probe(r.ready, ("a",)) is None
    assert r.outliers.probe(r.ready, ()) == "a"
    assert r.outliers.probe(r.ready, ()) is None
    assert r.out == {"a"}
    assert r.say("a", ANSWERED, at=31) == [True]
    assert r.out == set()


def test_a_probe_that_fails_doubles_the_time_and_one_without_a_verdict_is_repeated() -> None:
    r = room()
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(30)
    assert r.outliers.probe(r.ready, ()) == "a"
    r.say("a", NOTHING, at=30)
    assert r.outliers.probe(r.ready, ()) == "a"
    r.say("a", FAILED, at=30)
    r.outliers.sweep(89)
    assert r.outliers.probe(r.ready, ()) is None
    r.outliers.sweep(90)
    assert r.outliers.probe(r.ready, ()) == "a"


def test_replies_to_requests_from_before_a_change_say_nothing_about_it() -> None:
    r = room()
    r.say("a", *[FAILED] * 5, at=10)
    assert r.say("a", ANSWERED, sent=9, at=11) == [False]
    assert r.out == {"a"}
    r.outliers.sweep(40)
    r.outliers.probe(r.ready, ())
    r.say("a", FAILED, sent=9, at=41)
    assert r.outliers.breakers["a"].state is State.HALF_OPEN
    r.say("a", ANSWERED, sent=40, at=41)
    assert r.say("a", *[FAILED] * 5, sent=40.5, at=42) == [False] * 5


def test_time_out_grows_to_its_cap_and_healthy_intervals_forgive() -> None:
    r = room()
    now, times = 0.0, []
    r.say("a", *[FAILED] * 5)
    for _ in range(15):
        times.append(r.outliers.breakers["a"].until - now)
        now = r.outliers.breakers["a"].until
        r.outliers.sweep(now)
        assert r.outliers.probe(r.ready, ()) == "a"
        r.say("a", FAILED, at=now)
    assert times == [*range(30, 301, 30), *[300] * 5]
    now = r.outliers.breakers["a"].until
    r.outliers.sweep(now)
    r.say("a", ANSWERED, at=now)
    for turn in range(1, 11):
        assert r.outliers.breakers["a"].ejections == 11 - turn
        r.outliers.sweep(now + 10 * turn)
    r.outliers.sweep(now + 110)
    assert not r.outliers.breakers


def test_one_ejection_is_forgiven_per_healthy_interval() -> None:
    r = room()
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(30)
    r.say("a", FAILED, at=30)
    r.outliers.sweep(90)
    r.say("a", ANSWERED, at=90)
    counts = {}
    for now in range(91, 120):
        r.outliers.sweep(now)
        counts[now] = r.outliers.breakers["a"].ejections
    assert [counts[now] for now in (99, 100, 109, 110)] == [2, 1, 1, 0]
    r.outliers.sweep(120)
    assert not r.outliers.breakers


def test_the_cap_holds_whatever_it_is_a_multiple_of() -> None:
    r = room(base_s=40, cap_s=100)
    now, times = 0.0, []
    r.say("a", *[FAILED] * 5)
    for _ in range(4):
        times.append(r.outliers.breakers["a"].until - now)
        now = r.outliers.breakers["a"].until
        r.outliers.sweep(now)
        r.say("a", FAILED, at=now)
    assert times == [40, 80, 100, 100]


def test_one_that_left_is_forgotten() -> None:
    r = room()
    r.say("a", *[FAILED] * 5)
    r.outliers.sweep(30)
    r.outliers.forget("a")
    assert r.outliers.probe(r.ready, ()) is None
    assert r.out == set()


@pytest.mark.parametrize(
    ("code", "lost", "held_s", "expected"),
    [
        (Code.CODE_OK, False, 0, ANSWERED),
        (Code.CODE_INVALID_ARGUMENT, False, 0, ANSWERED),
        (Code.CODE_UNAVAILABLE, False, 0, FAILED),
        (Code.CODE_UNAVAILABLE, True, 0, NOTHING),
        (Code.CODE_INTERNAL, False, 0, FAILED),
        (Code.CODE_RESOURCE_EXHAUSTED, False, 0, NOTHING),
        (Code.CODE_CANCELLED, False, 9, NOTHING),
        (Code.CODE_NOT_FOUND, False, 0, NOTHING),
        (Code.CODE_DEADLINE_EXCEEDED, False, 0.1, NOTHING),
        (Code.CODE_DEADLINE_EXCEEDED, False, 1.9, NOTHING),
        (Code.CODE_DEADLINE_EXCEEDED, False, 2.0, FAILED),
    ],
)
def test_what_a_reply_says(code: Code, lost: bool, held_s: float, expected: Verdict) -> None:
    assert verdict(code, lost=lost, held_s=held_s, expected_s=1.0) is expected


@pytest.mark.parametrize(("held_s", "expected"), [(0.24, NOTHING), (0.25, FAILED)])
def test_a_caller_of_little_patience_blames_nobody_however_quick_the_model(
    held_s: float, expected: Verdict
) -> None:
    assert verdict(Code.CODE_DEADLINE_EXCEEDED, lost=False, held_s=held_s, expected_s=0.001) is expected


def test_what_is_usual_does_not_follow_errors() -> None:
    r = room()
    judge, usual = r.outliers.judge, r.outliers.usual
    assert usual("a", 0.1, sent_at=0) == 0.1
    judge("a", FAILED, 10, sent_at=0, now=1, usual_s=0.1)
    assert usual("a", 5.0, sent_at=0.5) == 5.0  # sent before anything was wrong
    assert usual("a", 5.0, sent_at=1) == 0.1
    judge("a", FAILED, 10, sent_at=0, now=1, usual_s=3.0)
    assert usual("a", 5.0, sent_at=1) == 0.1
    assert usual("b", 5.0, sent_at=1) == 5.0
    judge("a", ANSWERED, 10, sent_at=1, now=2)
    assert usual("a", 5.0, sent_at=2) == 5.0


@given(
    st.lists(st.tuples(st.sampled_from(NAMES[:5]), st.sampled_from(Verdict), st.floats(0, 40)), max_size=200),
    st.floats(0, 1),
)
def test_somebody_always_serves_and_never_too_few(
    said: list[tuple[str, Verdict, float]], share: float
) -> None:
    r = room(5, share=share, consecutive=2)
    now = 0.0
    for name, word, step in said:
        now += step
        r.outliers.sweep(now)
        r.outliers.probe(r.ready, ())
        r.say(name, word, at=now)
        offered, broken = r.outliers.offered(r.ready)
        assert offered
        assert broken or len(offered) >= 5 - max(1, int(share * 5))
        assert all(r.outliers.breakers[n].state is State.HALF_OPEN for n in r.outliers.due)
        assert len(set(r.outliers.due)) == len(r.outliers.due)
