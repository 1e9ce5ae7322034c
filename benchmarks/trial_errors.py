"""How often verdicts are wrong, and how soon they are right: `python -m benchmarks.trial_errors [runs]`.

Everything between logged requests and findings, as tests/property/test_trial_errors.py has it in small: runs
of twenty looks at two equal versions under error rate, mean latency, p99 and revenue without margins, so that
every finding is false; then how many answers a worse version gives before it is found harmful by more than
one point.
"""

from __future__ import annotations

import sys

import numpy as np
from headrace.v1.trials_pb2 import Evidence

from tests.fixtures.trial_units import World, findings, guardrails, revenue, trial

_LOOKS = 20
_SEED = 2026
EQUALS = {
    "1,500 users, weights 1 to 50%, errors and latency tripling": World(),
    "every request a unit, the same": World(users=0),
    "200 heavy users, 12,000 requests, a steady world": World(users=200, requests=12_000, drift=1.0),
    "1,500 users, half and half": World(weights=(0.5,)),
}
WORSE = {
    "5% against 1%": World(
        requests=22_000, users=0, weights=(0.1,), errors=0.01, treated_errors=0.05, drift=1.0
    ),
    "100% against 1%": World(
        requests=2_000, users=0, weights=(0.1,), errors=0.01, treated_errors=1.0, drift=1.0
    ),
}


def false_findings(world: World, runs: int) -> float:
    """Share of runs with any finding at any look."""
    made = trial([*guardrails(), revenue()])
    looks = [world.requests * look // _LOOKS for look in range(1, _LOOKS + 1)]
    found = 0
    for run in range(runs):
        requests = world.simulate(np.random.default_rng([_SEED, run]))
        found += bool(findings(made, requests, looks)[1])
    return found / runs


def answers_until_found(world: World, runs: int) -> list[int]:
    """Answers of the new version when it was found harmful, per run; all it gave where it was not."""
    made = trial(guardrails(0.01)[:1], alpha=0.025)
    taken = []
    for run in range(runs):
        requests = world.simulate(np.random.default_rng([_SEED, run]))
        answered = np.cumsum(requests.arms)
        step = 50 if world.treated_errors != 1.0 else 5
        looks = [int(np.searchsorted(answered, n)) + 1 for n in range(step, int(answered[-1]), step)]
        _, found = findings(made, requests, looks, until={Evidence.FINDING_HARMFUL})
        harmful = [look for look, one in found if one.finding == Evidence.FINDING_HARMFUL]
        taken.append(int(answered[harmful[0] - 1]) if harmful else int(answered[-1]))
    return taken


def main(runs: int) -> None:
    print(f"| equal versions, {runs} runs of {_LOOKS} looks, alpha 0.05 | runs with a false finding |")
    print("|---|---|")
    for name, world in EQUALS.items():
        print(f"| {name} | {false_findings(world, runs):.2%} |", flush=True)
    print(
        f"\n| a worse version at 10%, {max(20, runs // 10)} runs | answers until found: median | 95% | most |"
    )
    print("|---|---|---|---|")
    for name, world in WORSE.items():
        taken = answers_until_found(world, max(20, runs // 10))
        median, most = np.quantile(taken, [0.5, 0.95])
        print(f"| {name} | {median:.0f} | {most:.0f} | {max(taken)} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000)
