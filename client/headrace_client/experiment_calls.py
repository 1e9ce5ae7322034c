"""The calls about experiments and rollouts of the sync client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from headrace_client import experiments as calls
from headrace_client.errors import DeadlineExceeded
from headrace_client.exchange import Exchange
from headrace_client.results import Json

T = TypeVar("T")

#: Between two looks at a rollout.
EVERY_S = 1.0


class Connection(Protocol):
    """What the calls need of the client."""

    def run(self, call: Exchange[T], timeout: float | None) -> T: ...


class Experiments:
    """`client.experiments`: which variant answers whom, and what came of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        model: str,
        variants: Mapping[str, str] | Sequence[Mapping[str, Any]],
        *,
        start: bool = False,
        **options: Any,
    ) -> Json:
        """A new experiment. `variants`: name → version (equal weights), or a list of name, version and
        weight; the first is the control. `options`: unit, traffic, targeting, metrics, alpha, …"""
        options |= {"start": True} if start else {}
        return self._connection.run(calls.create_experiment(model, variants, options), None)

    def get(self, experiment_id: str) -> Json:
        """It as it is now, with its last verdict."""
        return self._connection.run(calls.experiment(experiment_id), None)

    def list(self, *, model: str | None = None, status: str | None = None) -> Iterator[Json]:
        """All of them, page by page."""
        after: str | None = ""
        while after is not None:
            page = self._connection.run(calls.experiments(model, status, after), None)
            yield from page["experiments"]
            after = page["next"]

    def patch(self, experiment_id: str, **changes: Any) -> Json:
        """Change it: anything of a draft, of one that runs weights, traffic, overrides and stop_at."""
        return self._connection.run(calls.change_experiment(experiment_id, changes), None)

    def delete(self, experiment_id: str) -> None:
        """Remove a draft."""
        self._connection.run(calls.delete_experiment(experiment_id), None)

    def start(self, experiment_id: str) -> Json:
        """Let it assign."""
        return self._connection.run(calls.start_experiment(experiment_id), None)

    def stop(self, experiment_id: str, *, reason: str | None = None, winner: str | None = None) -> Json:
        """Let it assign no more; with `winner` (a variant), that version gets all traffic from then on."""
        return self._connection.run(calls.stop_experiment(experiment_id, reason, winner), None)

    def assignment(
        self,
        experiment_id: str,
        unit: str | None = None,
        *,
        session: str | None = None,
        request_id: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Json:
        """Which variant a unit gets, and why."""
        call = calls.assignment(experiment_id, unit, session, request_id, attributes)
        return self._connection.run(call, None)

    def history(self, experiment_id: str, *, before: int | None = None) -> Json:
        """What changed, newest first, one page."""
        return self._connection.run(calls.history(experiment_id, before), None)

    def results(self, experiment_id: str) -> Json:
        """Every number, and a paragraph that says it plainly."""
        return self._connection.run(calls.results(experiment_id), None)

    def plan(self, **asked: Any) -> Json:
        """How many units it takes to find an effect."""
        return self._connection.run(calls.plan(asked), None)

    def holdout(self, model: str) -> Json:
        """The share of the units that no experiment on `model` gets."""
        return self._connection.run(calls.holdout(model), None)

    def set_holdout(self, model: str, share: float) -> Json:
        """Keep this share of the units, 0 … 1, out of all experiments on `model`."""
        return self._connection.run(calls.set_holdout(model, share), None)


class Rollouts:
    """`client.rollouts`: new versions that get traffic step by step, or are taken back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, model: str, version: str, **options: Any) -> Json:
        """Start one. `options`: strategy, steps, metrics, bake_s, …"""
        return self._connection.run(calls.create_rollout(model, version, options), None)

    def get(self, rollout_id: str) -> Json:
        """Where it stands, why, and what it waits for."""
        return self._connection.run(calls.rollout(rollout_id), None)

    def list(self, *, model: str | None = None, status: str | None = None) -> Iterator[Json]:
        """All of them, page by page."""
        after: str | None = ""
        while after is not None:
            page = self._connection.run(calls.rollouts(model, status, after), None)
            yield from page["rollouts"]
            after = page["next"]

    def events(self, rollout_id: str) -> Iterator[Json]:
        """Every decision with its reason, newest first, page by page."""
        before: int | None = None
        while True:
            page = self._connection.run(calls.rollout_events(rollout_id, before), None)
            yield from page["events"]
            before = page["next"]
            if before is None:
                return

    def pause(self, rollout_id: str, reason: str = "") -> Json:
        """Stay at this step."""
        return self._connection.run(calls.steer(rollout_id, "pause", reason), None)

    def resume(self, rollout_id: str, reason: str = "") -> Json:
        """Go on."""
        return self._connection.run(calls.steer(rollout_id, "resume", reason), None)

    def abort(self, rollout_id: str, reason: str = "") -> Json:
        """Take the new version back."""
        return self._connection.run(calls.steer(rollout_id, "abort", reason), None)

    def promote(self, rollout_id: str, reason: str = "") -> Json:
        """Take the next step without waiting."""
        return self._connection.run(calls.steer(rollout_id, "promote", reason), None)

    def watch(
        self, rollout_id: str, *, timeout: float | None = None, every: float = EVERY_S
    ) -> Iterator[Json]:
        """Its decisions, oldest first, as they come, until it has ended. Raises DeadlineExceeded where that
        takes longer than `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        last = 0
        while True:
            # Asked before the events: what ended it is among them then.
            ended = self.get(rollout_id)["status"] in calls.ENDED
            fresh: list[Json] = []
            for event in self.events(rollout_id):
                if event["number"] <= last:
                    break
                fresh.append(event)
            yield from reversed(fresh)
            last = fresh[0]["number"] if fresh else last
            if ended:
                return
            if deadline is not None and time.monotonic() + every > deadline:
                raise DeadlineExceeded(f"{rollout_id} has not ended in time.", code="DEADLINE_EXCEEDED")
            time.sleep(every)

    def wait(self, rollout_id: str, *, timeout: float | None = None, every: float = EVERY_S) -> Json:
        """The rollout once it has ended. Raises DeadlineExceeded."""
        for _ in self.watch(rollout_id, timeout=timeout, every=every):
            pass
        return self.get(rollout_id)
