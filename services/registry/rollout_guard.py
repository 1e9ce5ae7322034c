"""What nobody else may change while a rollout runs. Pure."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServingConfig

from services.common.errors import FailedPrecondition
from services.registry.rollout_words import percent
from services.registry.tables import RolloutRow


def rollout_name(row: RolloutRow) -> str:
    """As errors name it."""
    return f"rollout {row.rollout_id}"


def check_unmasked(config: ServingConfig, version: str, field: str) -> None:
    """Raises FailedPrecondition, naming `field`, where the log could not tell to which version a request was
    assigned: an answer of a fallback says so by its variant, whose name has to be the version's then, and no
    other may be called as the new `version` is."""
    named = [served for served in config.versions if served.variant not in ("", served.version)]
    for served in named:
        if config.HasField("fallback"):
            raise FailedPrecondition(
                f"version {config.fallback.version} of {config.model} is a fallback and version "
                f"{served.version} is called {served.variant!r}, which hides failures from a rollout's "
                "guardrails; deploy without one of both for as long as the rollout takes",
                field=field,
            )
        if served.variant == version:
            raise FailedPrecondition(
                f"version {served.version} of {config.model} is called {version!r} as another version is",
                field=field,
            )


def guard_rollout(row: RolloutRow, old: ServingConfig, new: ServingConfig) -> None:
    """Let `new` follow `old` while `row` runs: the shadow of a shadow step stays, and so does what versions
    are there for. Raises FailedPrecondition where versions, weights or that shadow would change, or a
    fallback would hide failures."""
    before = {version.version: version for version in old.versions}
    weights = {version.version: version.weight for version in new.versions}
    if weights != {name: version.weight for name, version in before.items()}:
        shares = ", ".join(f"{name} {percent(version.weight)}" for name, version in before.items())
        raise FailedPrecondition(
            f"{rollout_name(row)} moves the requests of {row.model} (now {shares}); abort it to set versions "
            "and weights",
            field="versions",
        )
    for version in new.versions:
        version.held = before[version.version].held
    check_unmasked(new, row.version, "fallback" if new.HasField("fallback") else "versions")
    if row.shadow_since is None:
        return
    if new.HasField("shadow") and new.shadow != old.shadow:
        raise FailedPrecondition(
            f"{rollout_name(row)} lets version {row.version} be the shadow; abort it to have another",
            field="shadow",
        )
    new.shadow.CopyFrom(old.shadow)
