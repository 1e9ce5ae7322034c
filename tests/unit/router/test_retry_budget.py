"""The budget: a share of what is in flight, with a floor."""

from __future__ import annotations

from services.router.retry_budget import RetryBudget


def taken(budget: RetryBudget) -> int:
    count = 0
    while budget.take():
        count += 1
    return count


def test_the_floor_holds_in_quiet_hours() -> None:
    assert taken(RetryBudget(0.2, 3)) == 3


def test_the_share_holds_under_load_and_what_ended_is_free_again() -> None:
    budget = RetryBudget(0.2, 3)
    budget.active = 100
    assert taken(budget) == 20
    assert budget.refused == 1
    budget.give_back()
    assert taken(budget) == 1


def test_none_at_all_can_be_asked_for() -> None:
    budget = RetryBudget(0.0, 0)
    budget.active = 1000
    assert taken(budget) == 0
