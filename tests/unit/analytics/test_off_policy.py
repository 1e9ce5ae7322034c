"""What another policy would have earned: estimates against the truth of made-up worlds."""

import numpy as np
import pytest

from services.analytics.off_policy import Log, by_unit, evaluate, off_policy_json, same_for_all, warnings
from services.common.errors import InvalidArgument, NotFound

REWARDS = np.array([0.10, 0.20, 0.15])


def log(
    rng: np.random.Generator, n: int = 4_000, shares: tuple[float, ...] = (0.5, 0.3, 0.2), each: int = 2
) -> Log:
    """`n` units with `each` requests of one variant; their rewards go together."""
    actions = np.repeat(rng.choice(3, n, p=shares), each)
    own = np.repeat(rng.normal(0, 0.05, n), each)
    rewards = rng.binomial(1, np.clip(REWARDS[actions] + own, 0, 1)).astype(float)
    return Log(
        variants=("a", "b", "c"),
        request_ids=[place.to_bytes(16, "little") for place in range(n * each)],
        units=np.repeat(np.arange(n), each).astype(np.uint64),
        actions=actions,
        propensities=np.array(shares)[actions],
        rewards=rewards,
    )


def test_estimates_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    truth = 0.8 * REWARDS[1] + 0.2 * REWARDS[2]
    covered = np.zeros(3)
    runs = 400
    for _ in range(runs):
        seen = log(rng, 800)
        found = evaluate(seen, same_for_all(seen, {"b": 0.8, "c": 0.2}))
        covered += [
            low <= truth <= high for low, high in (e.interval for e in (found.ips, found.snips, found.dr))
        ]
    assert covered / runs == pytest.approx([0.95, 0.95, 0.95], abs=0.03)


def test_the_logged_policy_earns_what_was_logged() -> None:
    seen = log(np.random.default_rng(2))
    found = evaluate(seen, same_for_all(seen, {"a": 0.5, "b": 0.3, "c": 0.2}))
    assert found.ips.value == pytest.approx(found.logged.value)
    assert found.dr.value == pytest.approx(found.logged.value, abs=0.005)
    low, high = found.difference.interval
    assert low < 0 < high
    assert found.effective_n == pytest.approx(8_000)
    assert warnings(found, 0) == []


def test_requests_of_one_unit_are_no_independent_evidence() -> None:
    once, often = (log(np.random.default_rng(3), 1_000, each=each) for each in (1, 1))
    twice = Log(
        often.variants,
        [*often.request_ids, *often.request_ids],
        np.tile(often.units, 2),
        np.tile(often.actions, 2),
        np.tile(often.propensities, 2),
        np.tile(often.rewards, 2),
    )
    policy = {"a": 0.2, "b": 0.8}
    alone, doubled = (evaluate(one, same_for_all(one, policy)) for one in (once, twice))
    assert doubled.ips.std_error == pytest.approx(alone.ips.std_error, rel=0.01)
    assert doubled.units == alone.units


def test_policies_unit_by_unit_cover_what_they_cover() -> None:
    seen = log(np.random.default_rng(4), 500)
    units = {unit: {"b": 0.9, "a": 0.1} for unit in range(400)}
    requests = {seen.request_ids[-1]: {"c": 1.0}}
    covered, policy, left_out = by_unit(seen, units, requests)
    assert covered.units.size == 801
    assert left_out == 199
    assert policy[-1].tolist() == [0, 0, 1]
    found = evaluate(covered, policy)
    assert any("have no assignment" in one for one in warnings(found, left_out))


def test_tiny_propensities_and_wrong_ones_are_warned_of() -> None:
    rng = np.random.default_rng(5)
    seen = log(rng, 2_000, shares=(0.99, 0.005, 0.005))
    far = evaluate(seen, same_for_all(seen, {"b": 1.0}))
    told = " ".join(warnings(far, 0))
    assert "worth" in told
    assert "as small as 0.005" in told
    lying = log(rng, 2_000)
    wrong = Log(
        lying.variants, lying.request_ids, lying.units, lying.actions, np.full(4_000, 0.5), lying.rewards
    )
    assert any("mean" in one for one in warnings(evaluate(wrong, same_for_all(wrong, {"c": 1.0})), 0))


def test_what_was_never_tried_is_not_estimated() -> None:
    seen = log(np.random.default_rng(6), 10)
    with pytest.raises(InvalidArgument) as refused:
        same_for_all(seen, {"z": 1.0})
    assert refused.value.field == "policy.weights.z"
    empty = seen.where(np.zeros(20, dtype=bool))
    with pytest.raises(NotFound):
        evaluate(empty, np.zeros((0, 3)))


def test_json_of_one_unit_has_no_interval() -> None:
    seen = log(np.random.default_rng(7), 1)
    found = evaluate(seen, same_for_all(seen, {"a": 0.5, "b": 0.3, "c": 0.2}))
    shown = off_policy_json("m", "reward", found, 0)
    assert shown["ips"]["interval"] is None
    assert "2 requests of 1 units" in shown["summary"]
