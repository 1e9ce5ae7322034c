"""What a rollout is, what is known of it, and what can be decided: the words of rollout_steps.py. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from headrace.v1.trials_pb2 import Verdict

from services.registry.buckets import BUCKETS

ERROR_RATE: Final = "error_rate"
SHADOW_DISAGREEMENT: Final = "shadow_disagreement"
SHADOW_ERRORS: Final = "shadow_error_rate"
#: Of copies, not of answers: they count while the new version is a shadow.
SHADOW_METRICS: Final = frozenset({SHADOW_DISAGREEMENT, SHADOW_ERRORS})


class Status(StrEnum):
    """RUNNING: in a step below 100%. BAKING: the new version answers everything, the previous one stays
    loaded."""

    RUNNING = "running"
    BAKING = "baking"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"

    @property
    def final(self) -> bool:
        return self in {Status.COMPLETED, Status.ROLLED_BACK, Status.ABORTED}


class Gate(StrEnum):
    """What must be proven before a step is left, beside that no guardrail is harmful: nothing; that every
    guardrail is safe; that a success metric is better."""

    NO_HARM = "no_harm"
    SAFE = "safe"
    BETTER = "better"


class Inconclusive(StrEnum):
    """What happens where the gate is still shut after a step's longest time."""

    HOLD = "hold"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


class Action(StrEnum):
    """WAIT: all is well, something is to come. HOLD: something is not well. ENTER: the step named. COMPLETE:
    the previous version may go. ROLL_BACK: the buckets as before. ABORT: nothing can be done any more.
    RESTART_CLOCK: the step's time is counted from now."""

    WAIT = "wait"
    HOLD = "hold"
    ENTER = "enter"
    COMPLETE = "complete"
    ROLL_BACK = "roll_back"
    ABORT = "abort"
    RESTART_CLOCK = "restart_clock"


class Cause(StrEnum):
    """Why, in one word: what metrics and people filter by."""

    STARTED = "started"
    FINISHED = "finished"
    GONE = "gone"
    PERSON = "person"
    PAUSED = "paused"
    LOADING = "loading"
    WORKERS = "workers"
    LOAD_FAILED = "load_failed"
    HARM = "harm"
    DRIFT = "drift"
    SAMPLE_RATIO = "sample_ratio"
    DURATION = "duration"
    VERDICT = "verdict"
    REQUESTS = "requests"
    GATE = "gate"
    INCONCLUSIVE = "inconclusive"
    CLOCK = "clock"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of a plan. `weight` and `shadow` are shares of the requests in 1/10,000; a step with `shadow`
    answers nothing. The last step of a plan has weight 10,000 and is left after the bake."""

    weight: int
    min_duration_s: float = 0.0
    min_requests: int = 0
    max_duration_s: float | None = None
    gate: Gate = Gate.NO_HARM
    shadow: int = 0
    match_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """Where a rollout stands. `entered_at` None: its first step waits for workers to load the new version.

    `clock_at` is what the step's durations count from: `entered_at`, later by the time it was paused.
    `trial_revision` is that of the weights now in force. Workers are waited for `load_timeout_s`; then the
    share `load_quorum` of them is enough. `promoted`: a person said that this step has taken
    long enough.
    """

    model: str
    version: str
    previous_version: str
    plan: tuple[PlannedStep, ...]
    status: Status
    step: int
    entered_at: datetime | None
    clock_at: datetime | None
    started_at: datetime
    trial_revision: int
    bake_s: float
    on_inconclusive: Inconclusive = Inconclusive.HOLD
    guardrails: tuple[str, ...] = ()
    successes: tuple[str, ...] = ()
    drift_guardrail: bool = True
    load_timeout_s: float = 900.0
    load_quorum: float = 0.75
    paused: bool = False
    promoted: bool = False

    @property
    def planned(self) -> PlannedStep:
        return self.plan[self.step]

    @property
    def at_full(self) -> bool:
        return self.planned.weight == BUCKETS

    @property
    def weight(self) -> int:
        """Of the new version, in 1/10,000, as published."""
        return 0 if self.entered_at is None else self.planned.weight


@dataclass(frozen=True, slots=True)
class Readiness:
    """Of the live workers of the model's pool: how many there are, how many can answer for the new version,
    what the first one that cannot load it says, and the first one that has no room for it now; and how many
    `failed` to load it and try again. While it is `settling` there may be others that were not heard of yet,
    and nothing is said of all of them."""

    workers: int
    ready: int
    error: str = ""
    no_room: str = ""
    failed: int = 0
    settling: bool = field(default=False, compare=False)

    @property
    def complete(self) -> bool:
        return 0 < self.workers == self.ready and not self.settling

    @property
    def hopeless(self) -> bool:
        """Nobody could load it: that is the version's fault and no worker's."""
        return 0 < self.workers == self.failed and not self.settling


@dataclass(frozen=True, slots=True)
class Alert:
    """An open drift alert of the new version. `raised_at` is when the registry first heard of it."""

    feature: str
    critical: bool
    raised_at: datetime
    message: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known now. `served`: weights of the versions deployed, None where the model is not.
    `verdict_at` is when the registry took `verdict` in. `waiting_since`: workers are all that it has waited
    for since then."""

    served: Mapping[str, int] | None
    readiness: Readiness
    verdict: Verdict | None = None
    verdict_at: datetime | None = None
    alerts: Sequence[Alert] = ()
    waiting_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One decision. `step` is the one to be in afterwards; `about` tells decisions of one cause apart (a
    metric, a feature); `reason` is for people."""

    action: Action
    cause: Cause
    reason: str
    step: int
    about: str = ""

    @property
    def changes_nothing(self) -> bool:
        return self.action in {Action.WAIT, Action.HOLD}
