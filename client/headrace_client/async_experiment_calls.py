"""The calls about experiments and rollouts of the async client: those of `experiment_calls`, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from headrace_client import experiments as calls
from headrace_client.errors import DeadlineExceeded
from headrace_client.exchange import Exchange
from headrace_client.experiment_calls import EVERY_S
from headrace_client.results import Json

T = TypeVar("T")


class Connection(Protocol):
    """What the calls need of the client."""

    async def run(self, call: Exchange[T], timeout: float | None) -> T: ...


class AsyncExperiments:
    """`client.experiments`: which variant answers whom, and what came of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(
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
        return await self._connection.run(calls.create_experiment(model, variants, options), None)

    async def get(self, experiment_id: str) -> Json:
        """It as it is now, with its last verdict."""
        return await self._connection.run(calls.experiment(experiment_id), None)

    async def list(self, *, model: str | None = None, status: str | None = None) -> AsyncIterator[Json]:
        """All of them, page by page."""
        after: str | None = ""
        while after is not None:
            page = await self._connection.run(calls.experiments(model, status, after), None)
            for found in page["experiments"]:
                yield found
            after = page["next"]

    async def patch(self, experiment_id: str, **changes: Any) -> Json:
        """Change it: anything of a draft, of one that runs weights, traffic, overrides and stop_at."""
        return await self._connection.run(calls.change_experiment(experiment_id, changes), None)

    async def delete(self, experiment_id: str) -> None:
        """Remove a draft."""
        await self._connection.run(calls.delete_experiment(experiment_id), None)

    async def start(self, experiment_id: str) -> Json:
        """Let it assign."""
        return await self._connection.run(calls.start_experiment(experiment_id), None)

    async def stop(self, experiment_id: str, *, reason: str | None = None, winner: str | None = None) -> Json:
        """Let it assign no more; with `winner` (a variant), that version gets all traffic from then on."""
        return await self._connection.run(calls.stop_experiment(experiment_id, reason, winner), None)

    async def assignment(
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
        return await self._connection.run(call, None)

    async def history(self, experiment_id: str, *, before: int | None = None) -> Json:
        """What changed, newest first, one page."""
        return await self._connection.run(calls.history(experiment_id, before), None)

    async def results(self, experiment_id: str) -> Json:
        """Every number, and a paragraph that says it plainly."""
        return await self._connection.run(calls.results(experiment_id), None)

    async def plan(self, **asked: Any) -> Json:
        """How many units it takes to find an effect."""
        return await self._connection.run(calls.plan(asked), None)

    async def holdout(self, model: str) -> Json:
        """The share of the units that no experiment on `model` gets."""
        return await self._connection.run(calls.holdout(model), None)

    async def set_holdout(self, model: str, share: float) -> Json:
        """Keep this share of the units, 0 … 1, out of all experiments on `model`."""
        return await self._connection.run(calls.set_holdout(model, share), None)


class AsyncRollouts:
    """`client.rollouts`: new versions that get traffic step by step, or are taken back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(self, model: str, version: str, **options: Any) -> Json:
        """Start one. `options`: strategy, steps, metrics, bake_s, …"""
        return await self._connection.run(calls.create_rollout(model, version, options), None)

    async def get(self, rollout_id: str) -> Json:
        """Where it stands, why, and what it waits for."""
        return await self._connection.run(calls.rollout(rollout_id), None)

    async def list(self, *, model: str | None = None, status: str | None = None) -> AsyncIterator[Json]:
        """All of them, page by page."""
        after: str | None = ""
        while after is not None:
            page = await self._connection.run(calls.rollouts(model, status, after), None)
            for found in page["rollouts"]:
                yield found
            after = page["next"]

    async def events(self, rollout_id: str) -> AsyncIterator[Json]:
        """Every decision with its reason, newest first, page by page."""
        before: int | None = None
        while True:
            page = await self._connection.run(calls.rollout_events(rollout_id, before), None)
            for event in page["events"]:
                yield event
            before = page["next"]
            if before is None:
                return

    async def pause(self, rollout_id: str, reason: str = "") -> Json:
        """Stay at this step."""
        return await self._connection.run(calls.steer(rollout_id, "pause", reason), None)

    async def resume(self, rollout_id: str, reason: str = "") -> Json:
        """Go on."""
        return await self._connection.run(calls.steer(rollout_id, "resume", reason), None)

    async def abort(self, rollout_id: str, reason: str = "") -> Json:
        """Take the new version back."""
        return await self._connection.run(calls.steer(rollout_id, "abort", reason), None)

    async def promote(self, rollout_id: str, reason: str = "") -> Json:
        """Take the next step without waiting."""
        return await self._connection.run(calls.steer(rollout_id, "promote", reason), None)

    async def watch(
        self, rollout_id: str, *, timeout: float | None = None, every: float = EVERY_S
    ) -> AsyncIterator[Json]:
        """Its decisions, oldest first, as they come, until it has ended. Raises DeadlineExceeded where that
        takes longer than `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        last = 0
        while True:
            # Asked before the events: what ended it is among them then.
            ended = (await self.get(rollout_id))["status"] in calls.ENDED
            fresh: list[Json] = []
            async for event in self.events(rollout_id):
                if event["number"] <= last:
                    break
                fresh.append(event)
            for event in reversed(fresh):
                yield event
            last = fresh[0]["number"] if fresh else last
            if ended:
                return
            if deadline is not None and time.monotonic() + every > deadline:
                raise DeadlineExceeded(f"{rollout_id} has not ended in time.", code="DEADLINE_EXCEEDED")
            await asyncio.sleep(every)

    async def wait(self, rollout_id: str, *, timeout: float | None = None, every: float = EVERY_S) -> Json:
        """The rollout once it has ended. Raises DeadlineExceeded."""
        async for _ in self.watch(rollout_id, timeout=timeout, every=every):
            pass
        return await self.get(rollout_id)
