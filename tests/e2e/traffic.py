"""Steady traffic of many users against one model, and what became of every request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

USERS = 20_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and its answer; `version` is empty where there was none."""

    user: str
    x: float
    status: int
    version: str
    body: dict[str, Any]


@dataclass
class Traffic:
    """Sends `rate` requests a second, each of a user chosen at random with an x by `draw`, until it is
    stopped. Never more than `at_once` are under way: a slow machine slows it down."""

    client: httpx.AsyncClient
    model: str
    rate: float
    draw: Callable[[random.Random], float]
    seed: int = 0
    at_once: int = 16
    answers: list[Answer] = field(default_factory=list)

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def by(self, version: str) -> int:
        """Requests that `version` answered."""
        return sum(answer.version == version for answer in self.answers)

    async def send(self, user: str, x: float) -> Answer:
        """One request now, not counted."""
        body = {"model": self.model, "inputs": [[x]], "user_id": user}
        try:
            reply = await self.client.post("/v1/predict", json=body)
        except httpx.HTTPError as error:
            return Answer(user, x, 0, "", {"detail": repr(error)})
        found = reply.json()
        return Answer(user, x, reply.status_code, found.get("version", ""), found)

    async def run(self) -> None:
        """Until cancelled; every request that was begun is answered and counted before this returns."""
        rng = random.Random(self.seed)
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(self.at_once)
        due = loop.time()

        async def one(user: str, x: float) -> None:
            try:
                self.answers.append(await self.send(user, x))
            finally:
                free.release()

        async with asyncio.TaskGroup() as requests:
            try:
                while True:
                    await free.acquire()
                    requests.create_task(one(f"user-{rng.randrange(USERS)}", self.draw(rng)))
                    due = max(due + 1 / self.rate, loop.time() - 1.0)
                    await asyncio.sleep(max(0.0, due - loop.time()))
            except asyncio.CancelledError:
                return


@asynccontextmanager
async def flowing(*traffic: Traffic) -> AsyncIterator[None]:
    """All of them flow while the block runs."""
    tasks = [asyncio.create_task(each.run(), name=each.model) for each in traffic]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
