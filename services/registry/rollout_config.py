"""What a rollout does to what is deployed. Pure: each function edits a configuration in place."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.v1.control_pb2 import ServedVersion, ServingConfig, Shadow

from services.common.assignment import BUCKETS
from services.common.errors import FailedPrecondition
from services.registry.rollout_plan import Rollout
from services.registry.rollout_schemas import StepIn
from services.registry.rollout_words import percent
from services.registry.serving_config import set_weights
from services.registry.trial_schemas import ten_thousandths


def in_service(config: ServingConfig) -> str:
    """The one version that answers. Raises FailedPrecondition where there are several."""
    weighted = [version for version in config.versions if version.weight]
    if len(weighted) > 1:
        shares = ", ".join(f"{v.version} ({percent(v.weight)})" for v in weighted)
        raise FailedPrecondition(
            f"several versions of {config.model} share its requests: {shares}; a rollout starts from one",
            field="model",
        )
    return weighted[0].version


def begin(config: ServingConfig, added: Iterable[ServedVersion], version: str, rollout_id: str) -> None:
    """Have the new `version` loaded, and draw the users anew: who met the last canary would meet every one,
    and remember it. One version answers all of them, so nobody changes version by that."""
    config.versions.extend(added)
    _hold(config, version)
    config.salt = f"{config.model}:{rollout_id}"


def enter_step(config: ServingConfig, before: ServingConfig, rollout: Rollout, asked: StepIn) -> None:
    """Weights and shadow of the step that `rollout` is in now, `asked` as the plan says it. Workers may give
    the room of a version without traffic to others: while the previous one is what is gone back to, it is
    held."""
    set_weights(config, {rollout.version: rollout.weight, rollout.previous_version: BUCKETS - rollout.weight})
    _hold(config, rollout.previous_version)
    if asked.shadow is None:
        restore_shadow(config, before, rollout.version)
    else:
        config.shadow.CopyFrom(
            Shadow(
                version=rollout.version,
                share=ten_thousandths(asked.shadow),
                tolerance=asked.tolerance,
                slice_by=asked.slice_by,
            )
        )


def restore(config: ServingConfig, before: ServingConfig, version: str) -> None:
    """The very buckets of `before`, and its shadow where `version` was made one since. Buckets stay where a
    version that had some is not served any more."""
    let_go(config, before, version)
    weights = {served.version: served.weight for served in before.versions if served.weight}
    if weights.keys() <= {served.version for served in config.versions}:
        set_weights(config, weights)
        del config.buckets[:]
        config.buckets.extend(before.buckets)


def hand_over(config: ServingConfig, version: str, previous: str, *, keep_previous: bool) -> None:
    """`version` is here for good; `previous` goes when it is released, unless it is kept."""
    for served in config.versions:
        if served.version == version:
            served.held = False
        elif served.version == previous:
            served.held = not keep_previous


def let_go(config: ServingConfig, before: ServingConfig, version: str) -> None:
    """Leave the weights as they are and nothing else of the rollout: versions that were there before are held
    as they were, and `version` is a shadow no more."""
    restore_shadow(config, before, version)
    held = {served.version: served.held for served in before.versions}
    for served in config.versions:
        served.held = held.get(served.version, served.held)


def restore_shadow(config: ServingConfig, before: ServingConfig, version: str) -> None:
    """Let `version` be a shadow no more; who was one before is one again, if it is still served: routers
    refuse a configuration whose shadow is not."""
    if config.shadow.version != version:
        return
    config.ClearField("shadow")
    if before.shadow.version in {served.version for served in config.versions}:
        config.shadow.CopyFrom(before.shadow)


def _hold(config: ServingConfig, version: str) -> None:
    for served in config.versions:
        served.held = served.held or served.version == version
