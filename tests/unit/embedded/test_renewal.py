"""New processes in the place of those that run, over small processes of their own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from deploy.embedded.blueprint import Blueprint, read_turn
from deploy.embedded.configuration import Configuration
from deploy.embedded.process import EmbeddedError
from deploy.embedded.server import Server
from deploy.embedded.supervisor import Supervisor
from tests.fixtures.waiting import PATIENCE_S
from tests.unit.embedded.test_keeper import Around, Small, keeping


class Part(Small):
    """One of a stack. As soon as it is ready, `rival` is killed, as by a machine that has no memory left."""

    def __init__(self, name: str, directory: Path, rival: Server | None = None) -> None:
        self.name = name
        super().__init__(directory)
        self.rival = rival

    def ready(self) -> bool:
        if self.rival is not None:
            self.rival.kill()
        return super().ready()


def blueprint(*services: Server) -> Blueprint:
    """Of `services`, callers before the called."""
    return Blueprint(
        servers=[],
        services=list(services),
        drain_order=[[service] for service in services],
        broker=None,
        bootstrap_servers="",
        external={},
        warnings=[],
        renewed=len(services),
    )


@pytest.mark.parametrize("killed", [False, True])
async def test_nothing_is_ended_for_a_new_process_that_is_not_there_any_more(
    tmp_path: Path, killed: bool
) -> None:
    configuration = Configuration.read({"HEADRACE_HOME": str(tmp_path)})
    old = [Part(name, tmp_path / "old") for name in ("gateway", "worker")]
    worker = Part("worker", tmp_path / "new")
    new = [Part("gateway", tmp_path / "new", worker if killed else None), worker]
    supervisor = Supervisor(configuration, lock=-1, draw=lambda *_: blueprint(*new))
    around = Around()
    async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as stack:
        for server in old:
            keeper = await stack.enter_async_context(keeping(server, around))
            supervisor._keepers[server.name] = keeper
            await keeper.came_up.wait()
        if killed:
            with pytest.raises(EmbeddedError, match="worker ended beside the one that runs"):
                await supervisor._renew(blueprint(*old))
        else:
            await supervisor._renew(blueprint(*old))
        kept, ended = (old, new) if killed else (new, old)
        assert [keeper.server for keeper in supervisor._keepers.values()] == kept
        assert all(server.alive for server in kept)
        assert not any(server.alive for server in ended)
        assert read_turn(tmp_path) == (0 if killed else 1)
