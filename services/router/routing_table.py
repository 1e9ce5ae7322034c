"""What is deployed: one Route per model, looked up for every request, replaced as a whole on every change."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import structlog
from headrace.v1.control_pb2 import Balancing, Experiment, ServedVersion, ServingConfig
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.assignment import BUCKETS, Buckets, fill
from services.common.errors import NotFound
from services.common.experiments import Assigned, Layer

log = structlog.get_logger(__name__)

VersionKey = tuple[str, str]


class Target:
    """One version that can be routed to; where an experiment assigns it, as one of its variants."""

    __slots__ = (
        "batched",
        "digest",
        "experiment",
        "fallback",
        "key",
        "name",
        "propensity",
        "stamp",
        "stamp_named",
        "variant",
        "version",
    )

    def __init__(
        self,
        model: str,
        served: ServedVersion,
        propensity: float,
        revision: int = 0,
        *,
        variant: str = "",
        experiment: str = "",
    ) -> None:
        self.key: VersionKey = (model, served.version)
        self.version = served.version
        self.variant = variant or served.variant or served.version
        #: The one that assigned it; "": none.
        self.experiment = experiment
        self.digest = served.artifact_digest
        #: Whether the first dimension of every tensor counts rows.
        self.batched = served.signature.batched
        #: Share of the units that its buckets get, 0 … 1.
        self.propensity = propensity
        #: Who answers where it fails; None: nobody else.
        self.fallback: Fallback | None = None
        #: Fields of a serialized PredictRequest: who answers; and with them how it came to that, assigned or
        #: named by the request.
        self.name = PredictRequest(
            version=self.version, variant=self.variant, experiment=experiment
        ).SerializeToString()
        known = self.name + PredictRequest(revision=revision).SerializeToString()
        self.stamp = known + PredictRequest(propensity=propensity).SerializeToString()
        self.stamp_named = known + PredictRequest(propensity=1.0).SerializeToString()


_TOLERANCE: Final = 0.001
_QUANTILE: Final = 0.95
#: Answers that call for the fallback where the deployment does not name them.
FAILURES: Final = frozenset({Code.CODE_UNAVAILABLE, Code.CODE_INTERNAL, Code.CODE_DEADLINE_EXCEEDED})


class CachePolicy(NamedTuple):
    """How long answers are kept, and up to what size."""

    ttl_ms: int
    max_entry_bytes: int


class Shadow(NamedTuple):
    """Who gets a copy of answered requests, of how many in 10,000, and when two numbers are the same."""

    target: Target
    share: int
    tolerance: float
    #: Attribute of requests by whose value comparisons are told apart; "": none.
    slice_by: str = ""


class Hedging(NamedTuple):
    """When a request is sent to a second worker as well: later than this share of the recent answers of its
    version, and than this many seconds."""

    quantile: float
    min_delay_s: float


class Fallback:
    """Who answers where the version that was routed fails."""

    __slots__ = ("on", "target")

    def __init__(self, target: Target, on: Iterable[Code]) -> None:
        self.target = target
        self.on = frozenset(on) or FAILURES


class Route:
    """Everything a request for one model needs."""

    __slots__ = (
        "_arms",
        "_buckets",
        "_by_name",
        "_of_unit",
        "_sole",
        "_targets",
        "balancing",
        "cache",
        "experiments",
        "fallback",
        "hedging",
        "log_payloads",
        "model",
        "revision",
        "shadow",
        "timeout",
        "timeout_s",
        "watched",
    )

    def __init__(self, config: ServingConfig, default_timeout_s: float) -> None:
        """Raises ValueError where the configuration cannot be served."""
        if not config.versions:
            raise ValueError("no version is served")
        versions = [served.version for served in config.versions]
        if len(set(versions)) < len(versions):
            raise ValueError("a version is served twice")
        filled = fill(config.buckets, versions)
        self.model = config.model
        self.revision = config.revision
        self.balancing: Balancing = config.balancing or Balancing.BALANCING_LEAST_LATENCY
        self.timeout_s = config.default_timeout_ms / 1e3 or default_timeout_s
        #: The field of a serialized PredictRequest that says the same.
        self.timeout = PredictRequest(timeout_us=int(self.timeout_s * 1e6)).SerializeToString()
        self._of_unit = Buckets(config.salt).of
        owned = dict.fromkeys(versions, 0)
        for part in config.buckets:
            owned[part.version] += part.last - part.first + 1
        self._targets = tuple(
            Target(config.model, served, owned[served.version] / BUCKETS, config.revision)
            for served in config.versions
        )
        self._sole = next((target for target in self._targets if owned[target.version] == BUCKETS), None)
        # 20 kB that most models, of which there may be thousands, have no need of.
        self._buckets = array("H", filled if self._sole is None else ())
        self._by_name = {target.version: target for target in self._targets}
        for alias, version in config.aliases.items():
            if version in self._by_name:
                self._by_name.setdefault(alias, self._by_name[version])

        self.log_payloads = config.log_payloads
        self.cache: CachePolicy | None = None
        if config.cache.ttl_ms:
            self.cache = CachePolicy(config.cache.ttl_ms, config.cache.max_entry_bytes)
        self.shadow: Shadow | None = None
        if config.shadow.share:
            shadow = config.shadow
            target = self._served(shadow.version, "shadow")
            self.shadow = Shadow(target, shadow.share, shadow.tolerance or _TOLERANCE, shadow.slice_by)
        self.hedging: Hedging | None = None
        if config.HasField("hedging"):
            quantile = min(max(config.hedging.quantile or _QUANTILE, 0.5), 0.999)
            self.hedging = Hedging(quantile, config.hedging.min_delay_ms / 1e3)
        self.fallback: Fallback | None = None
        if config.HasField("fallback"):
            self.fallback = self._fallback(config)
        #: Whether somebody else may have to do with a request that was assigned.
        self.watched = self.shadow is not None or self.fallback is not None
        #: None where no experiment runs.
        self.experiments: Layer | None = None
        self._arms: list[list[Target]] = []
        if config.experiments:
            self.experiments = self._layer(config)

    def _layer(self, config: ServingConfig) -> Layer:
        """What runs, with its variants in `_arms`: those that buckets assign, and those chosen by hand."""
        layer = Layer(config.model, config.experiments, config.holdout)
        for index, experiment in enumerate(config.experiments):
            shares = [layer.share(index, arm) for arm in range(len(experiment.variants))]
            self._arms.append(self._arms_of(experiment, config, shares))
            self._arms.append(self._arms_of(experiment, config, [1.0] * len(shares)))
        return layer

    def _arms_of(self, experiment: Experiment, config: ServingConfig, shares: list[float]) -> list[Target]:
        """The variants as they are stamped where they are assigned with these propensities."""
        served = {one.version: one for one in config.versions}
        arms = []
        for variant, share in zip(experiment.variants, shares, strict=True):
            if variant.version not in served:
                raise ValueError(f"variant {variant.name!r} of {experiment.experiment_id} is not served")
            label = {"variant": variant.name, "experiment": experiment.experiment_id}
            arm = Target(config.model, served[variant.version], share, config.revision, **label)
            if self.fallback is not None:
                self._stand_in(config, arm, self.fallback, label)
            arms.append(arm)
        return arms

    def _fallback(self, config: ServingConfig) -> Fallback:
        """Who stands in for all others."""
        fallback = Fallback(self._served(config.fallback.version, "fallback"), config.fallback.on)
        for target in self._targets:
            self._stand_in(config, target, fallback, {"variant": target.variant})
        return fallback

    @staticmethod
    def _stand_in(config: ServingConfig, arm: Target, fallback: Fallback, label: Mapping[str, str]) -> None:
        """Have the fallback answer where `arm` fails. Whoever answers in the end, the unit was given this
        variant and counts for it."""
        if arm.key == fallback.target.key:
            return
        (served,) = (one for one in config.versions if one.version == fallback.target.version)
        other = Target(config.model, served, arm.propensity, config.revision, **label)
        arm.fallback = Fallback(other, fallback.on)

    def _served(self, version: str, role: str) -> Target:
        for target in self._targets:
            if target.version == version:
                return target
        raise ValueError(f"the {role} {version!r} is not served")

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every version that is served, those without traffic of their own included."""
        return self._targets

    def assign(self, unit: bytes) -> Target:
        """The version that answers `unit`: always the same one while the configuration stays."""
        if self._sole is not None:
            return self._sole
        return self._targets[self._buckets[self._of_unit(unit)]]

    def arm(self, assigned: Assigned) -> Target:
        """The version that answers where an experiment has assigned."""
        return self._arms[2 * assigned.experiment + assigned.overridden][assigned.variant]

    def named(self, name: str) -> Target:
        """The version or alias `name`. Raises NotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"model {self.model} has no version {name!r} deployed", field="version") from None


class RoutingTable:
    """The routes by model, kept by the records of control.deployments.v1."""

    def __init__(self, default_timeout_s: float, on_change: Callable[[], None] = lambda: None) -> None:
        self._default_timeout_s = default_timeout_s
        self._on_change = on_change
        self._routes: dict[str, Route] = {}
        self._raw: dict[str, bytes] = {}
        self._unconfirmed: set[str] = set()
        #: The model's route, or None.
        self.find = self._routes.get
        #: Models whose newest record cannot be served: nothing that is changed of them takes effect.
        self.refused: set[str] = set()
        #: False until something is known of what is deployed, be it nothing.
        self.known = False

    def __iter__(self) -> Iterator[Route]:
        return iter(list(self._routes.values()))

    def __len__(self) -> int:
        return len(self._routes)

    def records(self) -> dict[str, bytes]:
        """The configurations by model, serialized, for the snapshot."""
        return dict(self._raw)

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record. An older revision is ignored, and so is one that cannot be served: the model's
        last good route stays."""
        model = key.decode()
        self._unconfirmed.discard(model)
        if value is None:
            self.refused.discard(model)
            if self._routes.pop(model, None) is not None:
                self._raw.pop(model, None)
                log.info("route_removed", model=model)
                self._on_change()
            return
        config = ServingConfig.FromString(value)
        if config.model != model:
            raise ValueError(f"the record of {model!r} is about {config.model!r}")
        current = self._routes.get(model)
        if current is not None and config.revision <= current.revision:
            return
        self.refused.add(model)
        self._routes[model] = Route(config, self._default_timeout_s)
        self.refused.discard(model)
        self._raw[model] = value
        log.info("route_changed", model=model, revision=config.revision)
        self._on_change()

    def restore(self, key: bytes, value: bytes | None) -> None:
        """Take one record of the snapshot."""
        self.apply(key, value)
        self._unconfirmed.add(key.decode())

    def confirm(self) -> None:
        """The topic was read to its end: what only the snapshot knew is deployed no more.

        Unless the topic knew nothing at all: then the broker lost it, and the registry will say it again.
        """
        if len(self._unconfirmed) < len(self._routes):
            for model in list(self._unconfirmed):
                self.apply(model.encode(), None)
        self._unconfirmed.clear()
