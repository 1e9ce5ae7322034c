"""Experiments in a router between a gateway and workers on real frames: who answers, and what is logged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.v1.control_pb2 import Condition, ServingConfig, Unit
from headrace.v1.dataplane_pb2 import Origin, PredictRequest
from headrace.v1.events_pb2 import PredictionBatch, ShadowComparison
from headrace.v1.tensor_pb2 import Code, Parameter

from services.common.assignment import unit_digest
from services.common.bus import Record
from services.common.topics import SHADOWS
from tests.fixtures.experiments import experiment
from tests.fixtures.router import FakeWorker, deploy, request, sole
from tests.fixtures.router_platform import Platform, platform, refuse, soon
from tests.fixtures.waiting import eventually


def serving(revision: int = 9, **more: object) -> ServingConfig:
    """Version 1 answers everybody; experiment exp_1 gives every other user version 2 (v1: 2, v0: 1)."""
    made = sole()
    made.revision = revision
    made.versions.add(version="2", artifact_digest="sha256:2")
    trial = experiment("exp_1")
    for variant, version in zip(trial.variants, ("1", "2"), strict=True):
        variant.version = version
    made.experiments.append(trial)
    made.MergeFrom(ServingConfig(**more))  # type: ignore[arg-type]
    return made


@asynccontextmanager
async def trying(directory: Path, made: ServingConfig) -> AsyncIterator[Platform]:
    async with platform(directory) as p:
        await take(p, made)
        yield p


async def take(p: Platform, made: ServingConfig) -> None:
    await deploy(p.bus, made)
    await eventually(lambda: p.router.dispatcher.table.find("cancer").revision == made.revision)  # type: ignore[union-attr]


def of(user: str, n: int = 0, **attributes: str) -> PredictRequest:
    made = request(n, unit=user)
    for name, value in attributes.items():
        made.attributes[name].string_value = value
    return made


def rows(records: list[PredictionBatch]) -> list[tuple[str, str, str, float]]:
    """Version, variant, experiment and propensity of every request."""
    return [
        (
            record.version,
            record.variant_names[record.variants[place]],
            record.experiment_ids[named - 1] if named else "",
            round(record.propensities[place], 4),
        )
        for record in records
        for place, named in enumerate(list(record.experiments) or [0] * len(record.rows))
    ]


async def test_assigned_requests_are_stamped_with_experiment_variant_and_propensity(tmp_path: Path) -> None:
    async with trying(tmp_path, serving()) as p:
        worker = await p.worker("w1")
        replies = await asyncio.gather(*(p.calls.predict(of(f"u{n}", n), soon()) for n in range(40)))
        assert {(one.version, one.variant, one.experiment) for one in replies} == {
            ("1", "v0", "exp_1"),
            ("2", "v1", "exp_1"),
        }
        for item in worker.seen:
            assert (item.experiment, item.propensity, item.revision) == ("exp_1", 0.5, 9)
            assert item.unit_hash == int.from_bytes(unit_digest(item.unit.encode()), "little")
        again = await asyncio.gather(*(p.calls.predict(of(f"u{n}", n), soon()) for n in range(40)))
        assert [one.variant for one in again] == [one.variant for one in replies]
        named = await p.ask(version="2", unit="u1")
        assert (named.version, named.variant, named.experiment) == ("2", "2", "")


async def test_a_session_is_a_unit_of_its_own_and_targeting_reads_parameters_too(tmp_path: Path) -> None:
    made = serving()
    made.experiments[0].unit = Unit.UNIT_SESSION
    german = Parameter(string_value="DE")
    made.experiments[0].targeting.append(
        Condition(attribute="country", operator=Condition.OPERATOR_IN, values=[german])
    )
    async with trying(tmp_path, made) as p:
        worker = await p.worker("w1")
        for n in range(10):
            asked = of(f"u{n}", n, country="DE")
            asked.session = "one session"
            await p.calls.predict(asked, soon())
        assert len({item.variant for item in worker.seen}) == 1
        assert {item.unit_hash for item in worker.seen} == {
            int.from_bytes(unit_digest(b"one session"), "little")
        }
        by_parameter = request(11)
        by_parameter.parameters["country"].CopyFrom(german)
        assert (await p.calls.predict(by_parameter, soon())).experiment == "exp_1"
        assert (await p.calls.predict(of("u1", 12, country="FR"), soon())).experiment == ""
        assert (await p.calls.predict(of("u1", 13), soon())).experiment == ""


async def test_overrides_and_the_end_take_effect_with_the_configuration(tmp_path: Path) -> None:
    made = serving()
    chosen = int.from_bytes(unit_digest(b"boss"), "little")
    made.experiments[0].ClearField("layer")
    made.experiments[0].override_units.append(chosen)
    made.experiments[0].override_variants.append(1)
    async with trying(tmp_path, made) as p:
        worker = await p.worker("w1")
        assert (await p.ask(unit="boss")).variant == "v1"
        assert worker.seen[0].propensity == 1.0
        assert (await p.ask(unit="anybody")).experiment == ""
        stopped = serving(revision=10)
        del stopped.experiments[:]
        await take(p, stopped)
        assert (await p.ask(unit="boss")).experiment == ""


async def test_a_fallback_answers_for_the_variant_that_the_unit_was_given(tmp_path: Path) -> None:
    """Were its requests another arm's, or nobody's, a version that fails would only get rid of them."""
    made = serving()
    made.fallback.version = "1"
    async with trying(tmp_path, made) as p:
        worker = await p.worker("w1")
        fails = refuse(Code.CODE_INTERNAL)

        def behave(worker: FakeWorker, peer: object, item: PredictRequest) -> None:
            (fails if item.version == "2" else FakeWorker.echo)(worker, peer, item)  # type: ignore[arg-type]

        worker.behave = behave
        replies = await asyncio.gather(*(p.calls.predict(of(f"u{n}", n), soon()) for n in range(20)))
        stood_in = [one for one in replies if one.fallback]
        assert 0 < len(stood_in) < 20
        assert {(one.version, one.variant, one.experiment) for one in stood_in} == {("1", "v1", "exp_1")}
        last = [item for item in worker.seen if item.attempt == 1]
        assert {(i.version, i.variant, i.experiment, i.propensity) for i in last} == {
            ("1", "v1", "exp_1", 0.5)
        }
        refused = [said for said in rows(await p.records()) if said[0] == "2"]
        assert refused == []  # the fallback's worker logs what it answered


async def test_refusals_are_logged_for_their_experiment(tmp_path: Path) -> None:
    async with trying(tmp_path, serving()) as p:
        worker = await p.worker("w1")
        worker.behave = refuse(Code.CODE_INVALID_ARGUMENT)
        replies = await asyncio.gather(*(p.calls.predict(of(f"u{n}", n), soon()) for n in range(20)))
        assert {(one.experiment, one.variant) for one in replies} == {("exp_1", "v0"), ("exp_1", "v1")}
        said = rows(await p.records())
        assert len(said) == 20
        assert set(said) == {("1", "v0", "exp_1", 0.5), ("2", "v1", "exp_1", 0.5)}


async def test_copies_for_a_shadow_are_of_no_experiment_and_told_apart_by_the_attribute(
    tmp_path: Path,
) -> None:
    made = serving()
    made.versions.add(version="3", artifact_digest="sha256:3")
    made.shadow.version, made.shadow.share, made.shadow.slice_by = "2", 10_000, "country"
    async with trying(tmp_path, made) as p:
        worker = await p.worker("w1")
        asked = [of(f"u{n}", n, **({"country": ("DE", "FR")[n % 2]} if n % 5 else {})) for n in range(20)]
        replies = await asyncio.gather(*(p.calls.predict(one, soon()) for one in asked))
        # Whoever got version 2 was answered by the shadow itself: there is nothing to compare.
        expected = sorted(
            one.attributes["country"].string_value if "country" in one.attributes else ""
            for one, reply in zip(asked, replies, strict=True)
            if reply.version == "1"
        )
        got: list[ShadowComparison] = []

        async def keep(records: list[Record] | tuple[Record, ...]) -> None:
            got.extend(ShadowComparison.FromString(record.value or b"") for record in records)

        async with p.bus.consume(SHADOWS, "test", keep):  # type: ignore[arg-type]
            await eventually(lambda: sum(len(one.codes) for one in got) >= len(expected))
        assert sorted(one.slice_names[place] for one in got for place in one.slices) == expected
        copies = [item for item in worker.seen if item.origin == Origin.ORIGIN_SHADOW]
        assert {(item.version, item.experiment, len(item.attributes)) for item in copies} == {("2", "", 0)}
