"""The catalogue: models, their versions and aliases. Every function runs in the caller's transaction and
answers with the messages of `registry.proto`; `artifacts.py` has stored a version's files before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headrace.v1.registry_pb2 import ArtifactFile, Lineage, Model, ModelVersion
from headrace.v1.tensor_pb2 import Signature

from services.common.clock import Clock
from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.registry import deployments, serving_config
from services.registry.artifacts import StoredVersion
from services.registry.deployments import no_model
from services.registry.repository import Repository
from services.registry.schemas import ModelIn, ModelPatch, VersionIn, utc_us
from services.registry.serving_config import DETERMINISTIC
from services.registry.tables import AliasRow, ModelRow, VersionRow
from services.registry.trials import end_trial


async def create_model(tx: Repository, wanted: ModelIn, clock: Clock) -> Model:
    """Raises AlreadyExists."""
    created = await tx.insert_model({**wanted.model_dump(), "created_at": clock.now()})
    if not created:
        raise AlreadyExists(f"there is a model {wanted.name!r} already", field="name")
    return await get_model(tx, wanted.name)


async def get_model(tx: Repository, name: str) -> Model:
    """Raises NotFound."""
    return _model(await _existing(tx, name), await tx.aliases(name))


async def list_models(tx: Repository, after: str, limit: int) -> tuple[list[Model], str | None]:
    """A page by name, and where the next one starts."""
    rows = await tx.models(after, limit + 1)
    page = rows[:limit]
    aliases = await tx.aliases(*[row.name for row in page])
    models = [_model(row, [a for a in aliases if a.model == row.name]) for row in page]
    return models, page[-1].name if len(rows) > limit else None


async def update_model(tx: Repository, name: str, patch: ModelPatch) -> Model:
    """Raises NotFound."""
    row = await _existing(tx, name, lock=True)
    if patch.description is not None:
        row.description = patch.description
    if patch.tags is not None:
        row.tags = dict(patch.tags)
    return _model(row, await tx.aliases(name))


async def delete_model(tx: Repository, name: str) -> None:
    """Delete a model, its versions and its experiments. Raises NotFound, FailedPrecondition while deployed,
    with aliases, or with an experiment that is to start.

    Artifacts stay in the store, since other versions may share them, and names of versions stay taken.
    """
    await _existing(tx, name, lock=True)
    if await tx.deployment(name) is not None:
        raise FailedPrecondition(f"{name} is deployed; undeploy it first", field="model")
    aliases = await tx.aliases(name)
    if aliases:
        names = ", ".join(alias.alias for alias in aliases)
        raise FailedPrecondition(f"{name} has aliases ({names}); remove them first", field="model")
    scheduled = await tx.experiments(name, ["scheduled"], "", 1)
    if scheduled:
        raise FailedPrecondition(f"experiment {scheduled[0].experiment_id} is to start on it", field="model")
    for trial_id in await tx.trials_of(name):
        end_trial(tx, trial_id)
        await tx.delete_experiment(trial_id)
    await tx.delete_model(name)


async def create_version(
    tx: Repository, model: str, wanted: VersionIn, stored: StoredVersion, clock: Clock
) -> tuple[ModelVersion, bool]:
    """A new immutable version and True; the same one again (files and metadata) gives the old one and False.

    Raises NotFound for an unknown model, AlreadyExists where the name stands for something else or did so.
    """
    await _existing(tx, model, lock=True)
    version = wanted.version or _next_number(await tx.version_names(model))
    row = VersionRow(
        model=model,
        version=version,
        backend=stored.backend,
        artifact_digest=stored.artifact_digest,
        artifact_bytes=sum(file.size for file in stored.files),
        signature=stored.signature.SerializeToString(deterministic=True),
        files=[{"path": f.path, "digest": f.digest, "size": f.size} for f in stored.files],
        metrics=dict(wanted.metrics),
        lineage=wanted.lineage.model_dump(),
        tags=_tags(stored, wanted.tags),
        created_at=clock.now(),
        deleted_at=None,
    )
    old = await tx.version(model, version)
    if old is not None:
        _check_same(old, row, stored)
        return _version(old), False
    if await tx.alias(model, version) is not None:
        raise AlreadyExists(f"{version!r} is an alias of {model}", field="version")
    if not await tx.take_version_name(model, version):
        raise _given_before(version)
    tx.add(row)
    await tx.flush()
    return _version(row), True


async def get_version(tx: Repository, model: str, version: str) -> ModelVersion:
    """`version` may be an alias. Raises NotFound."""
    alias = await tx.alias(model, version)
    return _version(await _existing_version(tx, model, alias.version if alias else version))


async def list_versions(
    tx: Repository, model: str, after: str, limit: int
) -> tuple[list[ModelVersion], str | None]:
    """A page, oldest first, and where the next one starts: behind a version, which may be deleted meanwhile.
    Raises NotFound for an unknown model, InvalidArgument where no version was ever called `after`."""
    await _existing(tx, model)
    last = await tx.version(model, after) if after else None
    if after and last is None:
        raise InvalidArgument(f"{model} has no version {after!r} to go on behind", field="after")
    rows = await tx.versions_behind(model, last, limit + 1)
    page = rows[:limit]
    return [_version(row) for row in page], page[-1].version if len(rows) > limit else None


async def delete_version(tx: Repository, model: str, version: str, clock: Clock) -> None:
    """Raises NotFound; FailedPrecondition while the version is deployed, an alias stands for it or an
    experiment is to start with it."""
    await _existing(tx, model, lock=True)
    row = await _existing_version(tx, model, version)
    aliases = [alias.alias for alias in await tx.aliases(model) if alias.version == version]
    if aliases:
        raise FailedPrecondition(f"{version!r} has aliases ({', '.join(aliases)})", field="version")
    deployment = await tx.deployment(model)
    if deployment is not None and version in serving_config.served_versions(deployment):
        raise FailedPrecondition(f"{version!r} is deployed", field="version")
    for experiment in await tx.experiments(model, ["scheduled"], "", 1000):
        if any(variant["version"] == version for variant in experiment.spec["variants"]):
            raise FailedPrecondition(
                f"experiment {experiment.experiment_id} is to start with {version!r}", field="version"
            )
    row.deleted_at = clock.now()


async def set_alias(tx: Repository, model: str, alias: str, version: str, clock: Clock) -> Model:
    """Let `alias` stand for `version`. Raises NotFound for an unknown model or version, AlreadyExists where a
    version has that name."""
    row = await _existing(tx, model, lock=True)
    await _existing_version(tx, model, version)
    if await tx.version(model, alias) is not None:
        raise AlreadyExists(f"{model} has a version named {alias!r}", field="alias")
    await tx.put_alias(model, alias, version, clock.now())
    await deployments.refresh_aliases(tx, model, clock)
    return _model(row, await tx.aliases(model))


async def remove_alias(tx: Repository, model: str, alias: str, clock: Clock) -> Model:
    """Raises NotFound."""
    row = await _existing(tx, model, lock=True)
    if await tx.alias(model, alias) is None:
        raise NotFound(f"{model} has no alias {alias!r}", field="alias")
    await tx.delete_alias(model, alias)
    await deployments.refresh_aliases(tx, model, clock)
    return _model(row, await tx.aliases(model))


async def _existing(tx: Repository, name: str, *, lock: bool = False) -> ModelRow:
    row = await tx.model(name, lock=lock)
    if row is None:
        raise no_model(name)
    return row


async def _existing_version(tx: Repository, model: str, version: str) -> VersionRow:
    row = await tx.version(model, version)
    if row is None or row.deleted_at is not None:
        await _existing(tx, model)
        raise NotFound(f"{model} has no version {version!r}", field="version")
    return row


def _next_number(names: Iterable[str]) -> str:
    """The whole number after the highest one given so far."""
    return str(max((int(name) for name in names if name.isdecimal() and name.isascii()), default=0) + 1)


def _given_before(version: str) -> AlreadyExists:
    return AlreadyExists(f"version {version!r} was deleted; its name is not given again", field="version")


def _tags(stored: StoredVersion, wanted: Mapping[str, str]) -> dict[str, str]:
    """The tags of a version whose owner wants these: what its file says of it comes before."""
    return ({DETERMINISTIC: "false"} if stored.random else {}) | dict(wanted)


def _check_same(old: VersionRow, new: VersionRow, stored: StoredVersion) -> None:
    """Raises AlreadyExists unless `new`, of `stored`, says the same as `old`."""
    if old.deleted_at is not None:
        raise _given_before(old.version)
    fixed = ("artifact_digest", "backend", "signature", "metrics", "lineage")
    changed = [name for name in fixed if getattr(old, name) != getattr(new, name)]
    # Rows from before files were read for random operators lack the tag that is set by itself.
    if _tags(stored, old.tags) != new.tags:
        changed.append("tags")
    if changed:
        raise AlreadyExists(
            f"version {old.version!r} exists with another {changed[0]}; a version never changes",
            field="version",
        )


def _model(row: ModelRow, aliases: Sequence[AliasRow]) -> Model:
    return Model(
        name=row.name,
        description=row.description,
        created_at_us=utc_us(row.created_at),
        aliases={alias.alias: alias.version for alias in aliases},
        tags=row.tags,
    )


def _version(row: VersionRow) -> ModelVersion:
    files: list[dict[str, Any]] = row.files
    return ModelVersion(
        model=row.model,
        version=row.version,
        artifact_digest=row.artifact_digest,
        backend=row.backend,
        signature=Signature.FromString(row.signature),
        metrics=row.metrics,
        lineage=Lineage(**row.lineage),
        files=[ArtifactFile(**file) for file in files],
        created_at_us=utc_us(row.created_at),
        tags=row.tags,
    )
