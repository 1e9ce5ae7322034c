"""What is run: how long, how often, at which concurrency; and what is left out first where time is short."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Payload:
    """A further workload: one round of closed loops on the fronts that carry it best."""

    workload: str
    connections: tuple[int, ...]
    #: Fronts that say nothing new about it.
    without: frozenset[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Of the main workload (30 floats) there are up to `rounds` rounds, as many as `budget_s` holds.
    In a round every server is started afresh. In the first its main front is measured with all
    `connections`, the others with `side_connections`; in further ones the main front with
    `core_connections`; `seconds` each.

    `curved` servers are driven beyond their capacity by an open loop, `overloaded` ones with a model that
    takes two milliseconds a row: fractions are of the capacity that the open loop itself found before.
    """

    name: str
    rounds: int
    seconds: float
    connections: tuple[int, ...]
    side_connections: tuple[int, ...]
    core_connections: tuple[int, ...]
    payloads: tuple[Payload, ...]
    curved: tuple[str, ...]
    overloaded: tuple[str, ...]
    curve_seconds: float
    curve_connections: int
    batching: bool
    instructions: bool
    budget_s: float = math.inf
    warm_up_s: float = 1.0
    direct_s: float = 1.5
    main: str = "mlp"
    overload: str = "busy"
    #: Offered beyond the capacity that was found. The two that are compared come twice in each round, each
    #: once before the other: windows differ by more than what is asked.
    beyond: tuple[float, ...] = (1.0, 2.0, 2.0, 1.0)
    overload_fractions: tuple[float, ...] = (0.9, 1.0, 1.5, 2.0, 4.0)
    #: How often each of these is offered, in turns: goodput of one window of two seconds varies by a tenth.
    beyond_rounds: int = 3
    #: Until when an answer is of use, from the moment when its request was due.
    patience_s: float = 1.0
    overload_patience_s: float = 2.0


PAYLOADS = (
    Payload(
        "mlp-100-rows",
        (1, 32),
        frozenset(
            {
                "Headrace, V2 JSON",
                "Headrace, analytics and drift stopped",
                "Headrace, gRPC",
                "Triton, gRPC",
                "MLServer, gRPC",
                "KServe (Python), gRPC",
            }
        ),
    ),
    Payload(
        "image",
        (1, 32),
        frozenset(
            {"Headrace, V2 JSON", "Headrace, analytics and drift stopped", "MLServer, adaptive batching"}
        ),
    ),
)

FULL = Plan(
    name="full",
    rounds=5,
    seconds=2,
    connections=(1, 32, 128, 512),
    side_connections=(1, 32, 128),
    core_connections=(1, 32, 128),
    payloads=PAYLOADS,
    curved=("headrace", "triton"),
    overloaded=("headrace", "triton"),
    curve_seconds=2,
    curve_connections=4096,
    batching=True,
    instructions=True,
    budget_s=20 * 60,
)
QUICK = Plan(
    name="quick",
    rounds=2,
    seconds=2,
    connections=(1, 32, 128),
    side_connections=(32,),
    core_connections=(1, 32, 128),
    payloads=(),
    curved=("headrace",),
    overloaded=("headrace",),
    curve_seconds=2,
    curve_connections=4096,
    batching=False,
    instructions=False,
    budget_s=8 * 60,
)
SMOKE = Plan(
    name="smoke",
    rounds=1,
    seconds=1,
    connections=(1, 32),
    side_connections=(32,),
    core_connections=(1, 32, 128),
    payloads=tuple(Payload(one.workload, (1,), one.without) for one in PAYLOADS),
    curved=("headrace",),
    overloaded=("headrace",),
    curve_seconds=1,
    curve_connections=1024,
    beyond_rounds=1,
    batching=False,
    instructions=False,
    warm_up_s=0.0,
    direct_s=0.3,
    beyond=(2.0,),
    overload_fractions=(2.0,),
)
PLANS = {plan.name: plan for plan in (FULL, QUICK, SMOKE)}
