"""Registering a version again: the same is accepted, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import pytest
from headrace.v1.tensor_pb2 import Signature

from services.common.clock import SystemClock
from services.common.errors import AlreadyExists
from services.registry.artifacts import StoredVersion
from services.registry.repository import Repository
from services.registry.schemas import VersionIn
from services.registry.service import create_version
from services.registry.tables import ModelRow, VersionRow

RANDOM = StoredVersion("sha256:" + "0" * 64, "onnx", Signature(), (), random=True)


class OneModel:
    """The part of a transaction that creating a version uses, over the rows of one model."""

    def __init__(self) -> None:
        self.rows: dict[str, VersionRow] = {}

    async def model(self, name: str, *, lock: bool = False) -> ModelRow:
        return ModelRow(name=name)

    async def version(self, _model: str, version: str) -> VersionRow | None:
        return self.rows.get(version)

    async def alias(self, _model: str, _alias: str) -> None:
        return None

    async def take_version_name(self, _model: str, version: str) -> bool:
        return version not in self.rows

    def add(self, row: VersionRow) -> None:
        self.rows[row.version] = row

    async def flush(self) -> None:
        return


async def registered(tx: OneModel, **described: Any) -> bool:
    """Whether the random model was new as version 1."""
    wanted = VersionIn(version="1", **described)
    _, created = await create_version(cast("Repository", tx), "m", wanted, RANDOM, SystemClock())
    return created


async def test_a_random_model_of_before_its_tag_is_the_same_again() -> None:
    tx = OneModel()
    assert await registered(tx, tags={"team": "x"})
    assert tx.rows["1"].tags == {"deterministic": "false", "team": "x"}
    assert not await registered(tx, tags={"team": "x"})
    tx.rows["1"].tags = {"team": "x"}  # as rows were written before files were read for random operators
    assert not await registered(tx, tags={"team": "x"})
    assert tx.rows["1"].tags == {"team": "x"}, "a version never changes"


@pytest.mark.parametrize("tags", [{}, {"team": "y"}, {"team": "x", "deterministic": "true"}])
async def test_other_tags_are_another_version(tags: dict[str, str]) -> None:
    tx = OneModel()
    await registered(tx, tags={"team": "x"})
    tx.rows["1"].tags = {"team": "x"}
    with pytest.raises(AlreadyExists, match="another tags"):
        await registered(tx, tags=tags)
