"""What it costs a router to decide who answers: microseconds per request, by what runs on the model.
`python -m benchmarks.assignment [--repeat N]`

CPU time, the best of several runs, for a machine that is also doing other things.
"""

from __future__ import annotations

import argparse
import sys
import time
import timeit
from typing import Final

from headrace.v1.control_pb2 import (
    BucketRange,
    Condition,
    Experiment,
    LayerRange,
    ServedVersion,
    ServingConfig,
    Unit,
    Variant,
    VariantRange,
)
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Parameter

from services.common.assignment import unit_digest
from services.router.routing_table import Route

_TIMES: Final = 20_000
_COUNTRY: Final = Condition(
    attribute="country", operator=Condition.OPERATOR_IN, values=[Parameter(string_value="DE")]
)


def experiment(number: int, first: int, last: int, unit: Unit = Unit.UNIT_USER, **more: object) -> Experiment:
    """Half of its units get version 1, half version 2."""
    made = Experiment(
        experiment_id=f"exp_{number}",
        unit=unit,
        salt=f"salt {number}",
        layer=[LayerRange(first=first, last=last)],
        variants=[Variant(name="control", version="1"), Variant(name="new", version="2")],
        buckets=[VariantRange(first=0, last=4999), VariantRange(first=5000, last=9999, variant=1)],
    )
    made.MergeFrom(Experiment(**more))  # type: ignore[arg-type]
    return made


def route(*experiments: Experiment, holdout: int = 0) -> Route:
    """Two versions, 50/50 beside the experiments."""
    return Route(
        ServingConfig(
            model="m",
            salt="m",
            versions=[ServedVersion(version="1"), ServedVersion(version="2")],
            buckets=[
                BucketRange(first=0, last=4999, version="1"),
                BucketRange(first=5000, last=9999, version="2"),
            ],
            experiments=experiments,
            holdout=holdout,
        ),
        30.0,
    )


ROUTES: Final = {
    "no experiment": route(),
    "one, all users": route(experiment(1, 0, 9999)),
    "one, targeted": route(experiment(1, 0, 9999, targeting=[_COUNTRY])),
    "one, with holdout and overrides": route(
        experiment(1, 0, 9999, override_units=[1, 2], override_variants=[0, 1]), holdout=500
    ),
    "three, of users, sessions and requests": route(
        experiment(1, 0, 2999, Unit.UNIT_USER),
        experiment(2, 3000, 5999, Unit.UNIT_SESSION),
        experiment(3, 6000, 9999, Unit.UNIT_REQUEST),
    ),
}


def decide(of: Route, request: PredictRequest) -> object:
    """As Routed.decide does."""
    unit = request.unit.encode() or request.request_id
    assigned = None if of.experiments is None else of.experiments.assign(request)
    if assigned is None:
        return of.assign(unit), unit_digest(unit)
    return of.arm(assigned), assigned.digest


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    request = PredictRequest(model="m", unit="user-123", session="session-7", request_id=bytes(range(16)))
    request.attributes["country"].string_value = "DE"
    for name, of in ROUTES.items():
        timer = timeit.Timer(lambda of=of: decide(of, request), timer=time.process_time)  # type: ignore[misc]
        best = min(timer.repeat(repeat, _TIMES))
        sys.stdout.write(f"{name:40} {best / _TIMES * 1e6:6.2f} µs\n")


if __name__ == "__main__":
    main()
