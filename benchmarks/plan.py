"""What is run: how long, how often, at which concurrency."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """`rounds` × every server × every front × every concurrency, `seconds` each, after a warm-up.

    A front is measured in the short plan only where its name is in `fronts` (empty: all). `curve` are offered
    loads of the open loop as fractions of the server's own closed-loop rate, for the servers in `curved`.
    """

    name: str
    rounds: int
    seconds: float
    connections: tuple[int, ...]
    workloads: tuple[str, ...]
    #: Of every workload but the first.
    further_rounds: int
    further_connections: tuple[int, ...]
    fronts: frozenset[str]
    curved: tuple[str, ...]
    curve: tuple[float, ...]
    curve_seconds: float
    curve_connections: int
    #: Further rounds are left out where the run would take longer than this.
    budget_s: float = math.inf
    warm_up_s: float = 1.0
    direct_s: float = 1.5


QUICK = Plan(
    name="quick",
    rounds=2,
    seconds=2,
    connections=(1, 32, 128),
    workloads=("mlp",),
    further_rounds=1,
    further_connections=(32,),
    fronts=frozenset(
        {
            "Headrace",
            "Headrace, V2 JSON",
            "Headrace, analytics and drift stopped",
            "Triton",
            "MLServer",
            "LitServe",
            "BentoML",
            "Ray Serve",
            "KServe (Python)",
        }
    ),
    curved=("headrace", "triton"),
    curve=(0.5, 0.75, 1.0, 1.5, 2.0),
    curve_seconds=2,
    curve_connections=1024,
    budget_s=480,
)
FULL = Plan(
    name="full",
    rounds=5,
    seconds=5,
    connections=(1, 32, 128, 512),
    workloads=("mlp", "cancer", "mlp-100-rows", "image"),
    further_rounds=3,
    further_connections=(1, 32),
    fronts=frozenset(),
    curved=("headrace", "triton", "mlserver", "ray"),
    curve=(0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0),
    curve_seconds=5,
    curve_connections=1024,
    direct_s=4,
)
SMOKE = Plan(
    name="smoke",
    rounds=1,
    seconds=1,
    connections=(1, 32),
    workloads=("mlp",),
    further_rounds=1,
    further_connections=(32,),
    fronts=frozenset(),
    curved=("headrace",),
    curve=(0.5, 2.0),
    curve_seconds=1,
    curve_connections=256,
    warm_up_s=0.0,
    direct_s=0.3,
)
PLANS = {plan.name: plan for plan in (QUICK, FULL, SMOKE)}
