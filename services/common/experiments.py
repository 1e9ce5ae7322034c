"""Which experiment assigns a request, and which of its variants. Pure: the router assigns by it, and the
registry explains by it.

A request is in one experiment at most. The order in which it is decided: overrides, the holdout, the layer
(every experiment owns buckets of it that no other one has), targeting, the variant's buckets. Where
experiments of different units want the same request, the first in the configuration gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from headrace.v1.control_pb2 import Condition, Experiment, Unit
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.assignment import BUCKETS, Buckets, claim, unit_digest
from services.common.targeting import Targeting

_UNITS: Final = (Unit.UNIT_USER, Unit.UNIT_SESSION, Unit.UNIT_REQUEST)


class Assigned(NamedTuple):
    """Who decides: experiment and variant by their place in the configuration."""

    experiment: int
    variant: int
    #: unit_digest of the experiment's unit.
    digest: bytes
    #: The unit was chosen for the variant: its propensity is 1.
    overridden: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one experiment makes of one request, and why."""

    in_experiment: bool
    #: Place of the variant that the unit gets, or would get were it in.
    variant: int
    #: Of the variant, among the units of the experiment; 1 for an overridden unit.
    propensity: float
    #: The unit's bucket under the salt of the layer, and under the experiment's own, 0 … 9999.
    layer_bucket: int
    bucket: int
    #: Chosen for the variant by hand, in this experiment.
    overridden: bool = False
    #: In the share of the units that no experiment gets.
    held_out: bool = False
    #: Whether the experiment owns `layer_bucket`.
    in_layer: bool = False
    #: The first condition that does not hold.
    unmet: Condition | None = None
    #: The experiment that gets the request instead.
    owner: str = ""


def layer_salt(model: str) -> str:
    """What the buckets that experiments of `model` own are salted with."""
    return f"layer:{model}"


def holdout_salt(model: str) -> str:
    """What the buckets that no experiment of `model` gets are salted with."""
    return f"holdout:{model}"


def unit_of(request: PredictRequest, unit: Unit) -> bytes:
    """What an experiment of `unit` assigns; a request that names none is its own."""
    if unit == Unit.UNIT_SESSION:
        return request.session.encode() or request.request_id
    if unit == Unit.UNIT_REQUEST:
        return request.request_id
    return request.unit.encode() or request.request_id


class _Variants:
    """One experiment: who is targeted, and which variant a unit of it gets."""

    __slots__ = ("_bucket_of", "_buckets", "overrides", "shares", "targeting", "unit")

    def __init__(self, experiment: Experiment) -> None:
        name = experiment.experiment_id
        if not name:
            raise ValueError("an experiment has no id")
        count = len(experiment.variants)
        parts = [(part.first, part.last, part.variant) for part in experiment.buckets]
        try:
            self.targeting = Targeting(experiment.targeting)
            owners = claim(parts)
        except ValueError as error:
            raise ValueError(f"experiment {name}: {error}") from None
        if None in owners:
            raise ValueError(f"experiment {name}: bucket {owners.index(None)} belongs to no variant")
        chosen = (*(part[2] for part in parts), *experiment.override_variants)
        if any(variant >= count for variant in chosen):
            raise ValueError(f"experiment {name} has {count} variants and names the {max(chosen)}th from 0")
        if len(experiment.override_units) != len(experiment.override_variants):
            raise ValueError(f"experiment {name}: overrides do not name one variant each")
        if experiment.unit not in (Unit.UNIT_UNSPECIFIED, *_UNITS):
            raise ValueError(f"experiment {name} assigns units of an unknown kind")
        self.unit = experiment.unit or Unit.UNIT_USER
        self._buckets = [owner or 0 for owner in owners]
        self._bucket_of = Buckets(experiment.salt).of
        self.shares = tuple(self._buckets.count(variant) / BUCKETS for variant in range(count))
        self.overrides = dict(zip(experiment.override_units, experiment.override_variants, strict=True))

    def bucket(self, unit: bytes) -> int:
        return self._bucket_of(unit)

    def pick(self, unit: bytes) -> int:
        return self._buckets[self._bucket_of(unit)]


class Layer:
    """The experiments that run on one model."""

    __slots__ = ("_bucket_of", "_experiments", "_held_out", "_holdout_of", "_ids", "_overrides", "_owners")

    def __init__(self, model: str, experiments: Sequence[Experiment], holdout: int = 0) -> None:
        """`holdout` is in 1/10,000. Raises ValueError where the configuration says what cannot be."""
        if holdout > BUCKETS:
            raise ValueError(f"a holdout of {holdout} in {BUCKETS}")
        self._ids = [experiment.experiment_id for experiment in experiments]
        if len(set(self._ids)) < len(self._ids):
            raise ValueError("an experiment is given twice")
        self._experiments = [_Variants(experiment) for experiment in experiments]
        self._held_out = holdout
        self._holdout_of = Buckets(holdout_salt(model)).of
        self._bucket_of = Buckets(layer_salt(model)).of
        # That nobody owns a bucket twice holds across the kinds of units too: the layer is one.
        owners = claim(
            (part.first, part.last, index)
            for index, experiment in enumerate(experiments)
            for part in experiment.layer
        )
        #: By kind of unit: who owns a bucket, -1: none of this kind.
        self._owners: list[tuple[Unit, list[int]]] = []
        #: By kind of unit: who was chosen by hand, for which experiment and variant.
        self._overrides: list[tuple[Unit, dict[int, tuple[int, int]]]] = []
        for unit in _UNITS:
            of_kind = [index for index, one in enumerate(self._experiments) if one.unit == unit]
            mine = [-1 if owner is None or owner not in of_kind else owner for owner in owners]
            if max(mine) >= 0:
                self._owners.append((unit, mine))
            chosen: dict[int, tuple[int, int]] = {}
            for index in of_kind:
                for digest, variant in self._experiments[index].overrides.items():
                    chosen.setdefault(digest, (index, variant))
            if chosen:
                self._overrides.append((unit, chosen))

    def share(self, experiment: int, variant: int) -> float:
        """The propensity of a variant, 0 … 1, for units that its buckets assign."""
        return self._experiments[experiment].shares[variant]

    def assign(self, request: PredictRequest) -> Assigned | None:
        """Who decides about `request`; None: no experiment, the deployment's own buckets do."""
        if self._overrides:
            chosen = self._chosen(request)
            if chosen is not None:
                return chosen
        if self._held_out and self._holdout_of(_held(request)) < self._held_out:
            return None
        best = -1
        unit = b""
        for kind, owners in self._owners:
            mine = unit_of(request, kind)
            index = owners[self._bucket_of(mine)]
            if index < 0 or 0 <= best < index or not self._experiments[index].targeting.holds(request):
                continue
            best, unit = index, mine
        if best < 0:
            return None
        return Assigned(best, self._experiments[best].pick(unit), unit_digest(unit))

    def _chosen(self, request: PredictRequest) -> Assigned | None:
        found: Assigned | None = None
        for kind, overrides in self._overrides:
            digest = unit_digest(unit_of(request, kind))
            choice = overrides.get(int.from_bytes(digest, "little"))
            if choice is not None and (found is None or choice[0] < found.experiment):
                found = Assigned(*choice, digest, overridden=True)
        return found

    def explain(self, request: PredictRequest, experiment_id: str) -> Explanation:
        """What `experiment_id` makes of `request`. Raises KeyError where it is not of this layer."""
        try:
            index = self._ids.index(experiment_id)
        except ValueError:
            raise KeyError(experiment_id) from None
        experiment = self._experiments[index]
        assigned = self.assign(request)
        mine = assigned is not None and assigned.experiment == index
        unit = unit_of(request, experiment.unit)
        overridden = mine and assigned is not None and assigned.overridden
        layer_bucket = self._bucket_of(unit)
        variant = assigned.variant if mine and assigned is not None else experiment.pick(unit)
        return Explanation(
            in_experiment=mine,
            variant=variant,
            propensity=1.0 if overridden else experiment.shares[variant],
            layer_bucket=layer_bucket,
            bucket=experiment.bucket(unit),
            overridden=overridden,
            held_out=self._holdout_of(_held(request)) < self._held_out,
            in_layer=any(
                kind == experiment.unit and owners[layer_bucket] == index for kind, owners in self._owners
            ),
            unmet=next(experiment.targeting.unmet(request), None),
            owner=self._ids[assigned.experiment] if assigned is not None and not mine else "",
        )


def _held(request: PredictRequest) -> bytes:
    """Whom a holdout keeps out: the user whatever the sessions; of nobody known, the session as a whole."""
    return request.unit.encode() or request.session.encode() or request.request_id
