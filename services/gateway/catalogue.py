"""The models that can be called, as `control.deployments.v1` tells them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from headrace.v1.control_pb2 import ServingConfig

from services.common.errors import NotFound
from services.gateway.signature import ModelSignature, compile_signature

#: Of versions that were in service before, those that are remembered.
_MOST_FORMER: Final = 16


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One version of a model that workers have loaded. `weight` is its share of the traffic in 1/10,000."""

    name: str
    signature: ModelSignature
    backend: str
    weight: int
    artifact_digest: str = ""

    @property
    def unnamed(self) -> ServedVersion:
        """By which answers of a version that nothing is known of are shown: its classes may be others, or the
        same in another order."""
        return replace(self, signature=replace(self.signature, classes=()))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in service. `default` decides the inputs of requests that name no version: the version with the
    largest share. `timeout_s` and `max_rows` are 0 where the deployment leaves them open."""

    name: str
    revision: int
    versions: dict[str, ServedVersion]
    aliases: dict[str, str]
    default: ServedVersion
    timeout_s: float
    max_rows: int
    #: Workers of this pool have it.
    pool: str = ""
    #: Versions that were in service before these: answers of theirs may be on their way.
    former: dict[str, ServedVersion] = field(default_factory=dict)

    def version(self, asked: str | None) -> ServedVersion:
        """The version whose signature counts for a request that asked for `asked`, a version or an alias;
        none: the default. Raises NotFound with field `version`."""
        if not asked:
            return self.default
        found = self.versions.get(asked) or self.versions.get(self.aliases.get(asked, ""))
        if found is None:
            raise NotFound(f"{self.name} has no version {asked[:64]!r} in service.", field="version")
        return found

    def answering(self, version: str) -> ServedVersion | None:
        """The version that an answer names, the default where it names none; None for one not heard of."""
        if not version:
            return self.default
        return self.versions.get(version) or self.former.get(version)


class Catalogue:
    """Every model in service, by name."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        #: The model of a name, None where there is none.
        self.find = self._models.get

    def apply(self, key: bytes, value: bytes | None) -> bool:
        """Take one record of the topic. Older revisions are ignored, which the answer False says. Raises
        ValueError for a record that no model can be made of; what was served before stays."""
        name = key.decode()
        if value is None:
            self._models.pop(name, None)
            return True
        config = ServingConfig.FromString(value)
        known = self._models.get(name)
        if known is not None and config.revision < known.revision:
            return False
        self._models[name] = served_model(config, known)
        return True

    def model(self, name: str) -> ServedModel:
        """Raises NotFound with field `model`."""
        found = self._models.get(name)
        if found is None:
            raise NotFound(f"There is no model {name[:64]!r} in service.", field="model")
        return found

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(sorted(self._models.values(), key=lambda model: model.name))

    def __len__(self) -> int:
        return len(self._models)


def served_model(config: ServingConfig, before: ServedModel | None = None) -> ServedModel:
    """The working form of `config`, which takes the place of `before`. Raises ValueError where it has no
    version or a signature makes no sense."""
    if not config.versions:
        raise ValueError(f"{config.model} has no version")
    versions = {
        version.version: ServedVersion(
            version.version,
            compile_signature(version.signature),
            version.backend,
            version.weight,
            version.artifact_digest,
        )
        for version in config.versions
    }
    earlier = {**before.former, **before.versions} if before is not None else {}
    former = [(name, version) for name, version in earlier.items() if name not in versions]
    return ServedModel(
        name=config.model,
        revision=config.revision,
        versions=versions,
        aliases=dict(config.aliases),
        default=max(versions.values(), key=lambda version: version.weight),
        timeout_s=config.default_timeout_ms / 1000,
        max_rows=config.batching.max_rows,
        pool=config.pool,
        former=dict(former[-_MOST_FORMER:]),
    )
