"""What a model's serving looks like, as gateways, routers and workers read it: made of what callers want, and
edited in place. No database; revisions are those of `deployments`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

from headrace.v1.control_pb2 import (
    Balancing,
    Batching,
    BucketRange,
    Cache,
    Fallback,
    Hedging,
    ServedVersion,
    ServingConfig,
    Shadow,
)
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec

from services.common.errors import InvalidArgument
from services.registry.buckets import BUCKETS, Range, allocate
from services.registry.schemas import CacheIn, DeployIn, FallbackIn, ShadowIn, Share
from services.registry.tables import DeploymentRow, VersionRow

#: A tag of versions: "false" where the inputs alone do not make the answer. Set where a file has random
#: operators and its owner says nothing else.
DETERMINISTIC = "deterministic"


def composed(
    model: str,
    wanted: DeployIn,
    served: Sequence[ServedVersion],
    aliases: Mapping[str, str],
    old: ServingConfig,
    holdout: int,
) -> ServingConfig:
    """The configuration that follows `old`, without a revision: units stay where they are as far as weights
    allow, experiments as they were. Raises InvalidArgument naming the field of a version that is not
    `served`."""
    return ServingConfig(
        model=model,
        versions=served,
        aliases=resolvable(aliases, served),
        buckets=_buckets(old.buckets, served),
        salt=old.salt or model,
        pool=wanted.pool,
        batching=Batching(**wanted.batching.model_dump()),
        balancing=cast(Balancing, Balancing.Value(f"BALANCING_{wanted.balancing.upper()}")),
        log_payloads=wanted.log_payloads,
        default_timeout_ms=wanted.default_timeout_ms,
        fallback=_fallback(wanted.fallback, aliases, served),
        cache=_cache(wanted.cache),
        shadow=_shadow(wanted.shadow, aliases, served),
        hedging=None if wanted.hedging is None else Hedging(**wanted.hedging.model_dump()),
        experiments=old.experiments,
        holdout=holdout,
    )


def chosen(
    model: str, wanted: Sequence[Share], aliases: Mapping[str, str], rows: Mapping[str, VersionRow]
) -> list[ServedVersion]:
    """The versions that callers want, with their weights; `rows` are those of `model`, by version. Raises
    InvalidArgument naming `versions…` where weights do not add up, a version is not there or a name stands
    twice."""
    total = sum(share.ten_thousandths for share in wanted)
    if total != BUCKETS:
        raise InvalidArgument(f"the weights add up to {total / 100:g}%, not 100%", field="versions")
    names = [aliases.get(share.version, share.version) for share in wanted]
    served: list[ServedVersion] = []
    for index, (name, share) in enumerate(zip(names, wanted, strict=True)):
        row = rows.get(name)
        if row is None:
            raise InvalidArgument(
                f"{model} has no version {share.version!r}", field=f"versions[{index}].version"
            )
        if any(other.version == name for other in served):
            raise InvalidArgument(f"version {name!r} stands twice", field=f"versions[{index}].version")
        variant = share.variant or name
        if any(other.variant == variant for other in served):
            raise InvalidArgument(f"variant {variant!r} stands twice", field=f"versions[{index}].variant")
        served.append(served_version(row, share.ten_thousandths, variant))
    return served


def check_kept(rows: Iterable[VersionRow], field: str) -> None:
    """Raises InvalidArgument, field `field`, where answers of one of `rows` must not be kept for equal
    inputs."""
    for row in rows:
        if row.tags.get(DETERMINISTIC) == "false":
            raise InvalidArgument(
                f"answers of version {row.version!r} cannot be cached: its tag {DETERMINISTIC} is false, for"
                " it gives equal inputs unequal answers",
                field=field,
            )


def check_inputs(config: ServingConfig) -> None:
    """Raises InvalidArgument naming a version of `config` and the input in which it is unlike the one that
    requests are read for, where it gets the same requests: a share of them, or those of a shadow, a fallback
    or an experiment. Whoever names a version sends what that one takes."""
    arms = {variant.version for experiment in config.experiments for variant in experiment.variants}
    for index, version in enumerate(config.versions):
        if version.weight:
            check_alike(config, version, f"versions[{index}].version")
        elif version.version == config.shadow.version:
            check_alike(config, version, "shadow.version")
        elif version.version == config.fallback.version:
            check_alike(config, version, "fallback.version")
        elif version.version in arms:
            check_alike(config, version, "versions")


def check_alike(config: ServingConfig, version: ServedVersion, field: str) -> None:
    """Raises InvalidArgument, field `field`, where no request fits both `version` and the one of `config`
    that gateways read requests for. Outputs may differ."""
    first = max(config.versions, key=lambda one: one.weight)
    given = {spec.name: spec for spec in first.signature.inputs}
    taken = {spec.name: spec for spec in version.signature.inputs}
    for name in sorted(given.keys() | taken.keys()):
        one, other = given.get(name), taken.get(name)
        if one is None:
            problem = f"needs an input {name!r}, which version {first.version!r} does not take"
        elif other is None:
            problem = f"has no input {name!r}, which version {first.version!r} takes"
        elif not _fit(one, other):
            problem = f"takes {name!r} as {_form(other)}, version {first.version!r} as {_form(one)}"
        else:
            continue
        raise InvalidArgument(
            f"version {version.version!r} {problem}; versions that get the same requests take equal inputs",
            field=field,
        )


def release(config: ServingConfig, needed: Collection[str]) -> None:
    """Take out of `config` what was brought by something that runs, and is neither `needed` nor answers
    anybody any more."""
    used = {*needed, config.fallback.version, config.shadow.version}
    stay = [v for v in config.versions if not v.held or v.weight or v.version in used]
    if len(stay) < len(config.versions):
        kept = [ServedVersion.FromString(version.SerializeToString()) for version in stay]
        del config.versions[:]
        config.versions.extend(kept)


def set_weights(config: ServingConfig, weights: Mapping[str, int]) -> None:
    """Give the versions of `config` these weights in 1/10,000, 0 where there is none, moving as few units as
    possible. `weights` add up to 10,000 (ValueError else)."""
    for version in config.versions:
        version.weight = weights.get(version.version, 0)
    moved = _buckets(config.buckets, config.versions)
    del config.buckets[:]
    config.buckets.extend(moved)


def served_versions(row: DeploymentRow) -> set[str]:
    """Versions that a deployment holds loaded, those of weight 0 included."""
    return {served.version for served in ServingConfig.FromString(row.config).versions}


def without_traffic(version: ServedVersion) -> ServedVersion:
    """A copy that nobody is assigned to."""
    again = ServedVersion()
    again.CopyFrom(version)
    again.weight = 0
    return again


def served_version(row: VersionRow, weight: int, variant: str) -> ServedVersion:
    """A registered version as workers and routers know it; `weight` in 1/10,000."""
    return ServedVersion(
        version=row.version,
        artifact_digest=row.artifact_digest,
        backend=row.backend,
        signature=Signature.FromString(row.signature),
        variant=variant,
        weight=weight,
        artifact_bytes=row.artifact_bytes,
    )


def _fit(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether some tensor fits both; -1 is any size."""
    return (
        one.datatype == other.datatype
        and len(one.shape) == len(other.shape)
        and all(a == b or -1 in (a, b) for a, b in zip(one.shape, other.shape, strict=True))
    )


def _form(spec: TensorSpec) -> str:
    datatype = DataType.Name(spec.datatype).removeprefix("DATA_TYPE_")
    return f"{datatype}[{','.join(map(str, spec.shape))}]"


def _fallback(
    wanted: FallbackIn | None, aliases: Mapping[str, str], served: Sequence[ServedVersion]
) -> Fallback | None:
    if wanted is None:
        return None
    version = _another_version(wanted.version, aliases, served, "fallback.version")
    codes = {Code.Value(f"CODE_{name}") for name in wanted.on}
    return Fallback(version=version, on=[cast(Code, code) for code in sorted(codes)])


def _shadow(
    wanted: ShadowIn | None, aliases: Mapping[str, str], served: Sequence[ServedVersion]
) -> Shadow | None:
    if wanted is None:
        return None
    version = _another_version(wanted.version, aliases, served, "shadow.version")
    return Shadow(
        version=version,
        share=int(wanted.share * 100),
        tolerance=wanted.tolerance,
        slice_by=wanted.slice_by,
    )


def _cache(wanted: CacheIn | None) -> Cache | None:
    if wanted is None:
        return None
    return Cache(ttl_ms=round(wanted.ttl_s * 1000), max_entry_bytes=wanted.max_entry_bytes)


def _another_version(
    name: str, aliases: Mapping[str, str], served: Sequence[ServedVersion], field: str
) -> str:
    """`name` as one of several versions that are served. Raises InvalidArgument, field `field`."""
    version = aliases.get(name, name)
    if all(other.version != version for other in served):
        raise InvalidArgument(
            f"version {name!r} is not among the versions served: name it there, with weight 0 for no share",
            field=field,
        )
    if len(served) == 1:
        raise InvalidArgument(f"version {name!r} is the only one served", field=field)
    return version


def _buckets(old: Sequence[BucketRange], served: Sequence[ServedVersion]) -> list[BucketRange]:
    before = [Range(piece.first, piece.last, piece.version) for piece in old]
    after = allocate(before, {version.version: version.weight for version in served})
    return [BucketRange(first=piece.first, last=piece.last, version=piece.version) for piece in after]


def resolvable(aliases: Mapping[str, str], served: Sequence[ServedVersion]) -> dict[str, str]:
    """Aliases of versions that are served: a name that the topic carries can always be answered."""
    versions = {version.version for version in served}
    return {alias: version for alias, version in aliases.items() if version in versions}


def set_aliases(config: ServingConfig, aliases: Mapping[str, str]) -> None:
    """In place of those of `config`."""
    config.aliases.clear()
    config.aliases.update(aliases)


def same_state(a: ServingConfig, b: ServingConfig) -> bool:
    """Equal but for when and as what revision they were published."""
    left, right = ServingConfig(), ServingConfig()
    left.CopyFrom(a)
    right.CopyFrom(b)
    for config in (left, right):
        config.revision = config.published_at_us = 0
    return left == right
