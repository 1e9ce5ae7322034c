"""The trials there are: control.trials.v1, followed."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.trials_pb2 import Trial

log = structlog.get_logger(__name__)


class Trials:
    """Applies records of the topic. Revisions only grow; a trial that a returning broker no longer knows
    stays, since the registry says everything again."""

    def __init__(self) -> None:
        self._known: dict[str, Trial] = {}
        #: The same by model: each delivery asks for those of every model in it.
        self._of_model: dict[str, dict[str, Trial]] = {}
        #: What ended for good: nothing of it needs to be kept.
        self.ended: set[str] = set()
        self._changed: Callable[[str], None] = lambda _model: None

    def watch(self, changed: Callable[[str], None]) -> None:
        """`changed` is told the model of every change from now on."""
        self._changed = changed

    def apply(self, key: bytes, value: bytes | None) -> None:
        """Take one record. One that is older than what is known, or can be no trial, changes nothing."""
        name = key.decode("utf-8", "replace")
        known = self._known.get(name)
        if value is None:
            self.ended.add(name)
            if known is not None:
                self._drop(known)
                self._changed(known.model)
            return
        try:
            trial = Trial.FromString(value)
        except DecodeError:
            log.warning("trial_unreadable", trial_id=name, size=len(value))
            return
        if trial.trial_id != name or len(trial.arms) < 2 or not trial.model:
            log.warning("trial_ignored", trial_id=name, arms=len(trial.arms))
            return
        if known is not None and trial.revision < known.revision:
            return
        self.ended.discard(name)
        if trial != known:
            if known is not None and known.model != trial.model:
                self._drop(known)
            self._known[name] = trial
            self._of_model.setdefault(trial.model, {})[name] = trial
            self._changed(trial.model)

    def get(self, trial_id: str) -> Trial | None:
        """The newest record of a trial, closed ones included."""
        return self._known.get(trial_id)

    def open(self, model: str = "") -> list[Trial]:
        """Those on which verdicts are wanted: started and not closed; of `model` where given."""
        trials = self._of_model.get(model, {}) if model else self._known
        return [trial for trial in trials.values() if trial.started_at_us and not trial.closed]

    def of(self, model: str) -> list[Trial]:
        """Every trial of a model that is known, closed ones included."""
        return list(self._of_model.get(model, {}).values())

    def _drop(self, trial: Trial) -> None:
        del self._known[trial.trial_id]
        of_model = self._of_model[trial.model]
        del of_model[trial.trial_id]
        if not of_model:
            del self._of_model[trial.model]
