"""How long closed experiments and rollouts are kept, as an actor of the controller."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from services.registry.repository import Repository
from services.registry.trials import end_trial

_LOOK_EVERY = timedelta(minutes=1)
_FORGET = "forget"


class RetentionActor:
    """Forgets what was closed long ago, with its history and its verdict, and tells analytics to."""

    kind = "retention"
    actions = (_FORGET,)
    #: What was closed waits for nobody.
    is_open = False

    def __init__(self, keep: timedelta) -> None:
        self._keep = keep
        self._found_none_at: datetime | None = None

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        """Trials that were closed so long ago; some of them where they are many. For a minute after
        there were none, it is not looked."""
        if self._found_none_at is not None and abs(now - self._found_none_at) < _LOOK_EVERY:
            return ()
        found = await tx.trials_closed_before(now - self._keep)
        self._found_none_at = None if found else now
        return found

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        """Forget one, unless somebody else does."""
        row = await tx.experiment(trial_id) or await tx.rollout(trial_id)
        if row is None:
            return None
        if await tx.model(row.model, lock=True, skip_locked=True) is None and await tx.model(row.model):
            return None
        if trial_id not in await tx.trials_closed_before(now - self._keep):
            return None
        await tx.delete_trial(trial_id)
        end_trial(tx, trial_id)
        return _FORGET
