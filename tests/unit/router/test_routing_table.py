"""Routes and the table that holds them."""

from __future__ import annotations

import pytest
from headrace.v1.control_pb2 import Balancing, BucketRange, Fallback, ServedVersion
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.errors import NotFound
from services.common.experiments import Assigned
from services.router.routing_table import FAILURES, Route, RoutingTable
from tests.fixtures.experiments import experiment
from tests.fixtures.router import config, sole


def applied(*revisions: int) -> RoutingTable:
    table = RoutingTable(30.0)
    for revision in revisions:
        table.apply(b"cancer", config(revision=revision).SerializeToString())
    return table


class TestRoute:
    def test_names_aliases_and_their_targets(self) -> None:
        route = Route(config(), 30.0)
        assert route.named("champion") is route.named("1")
        assert route.named("2").variant == "2"
        assert route.named("1").variant == "control"
        assert route.named("1").propensity == 0.9
        with pytest.raises(NotFound) as caught:
            route.named("old")  # an alias of a version that is not deployed
        assert caught.value.field == "version"

    def test_an_alias_never_hides_a_version(self) -> None:
        made = config()
        made.aliases["2"] = "1"
        assert Route(made, 30.0).named("2").version == "2"

    def test_defaults(self) -> None:
        route = Route(config(), 30.0)
        assert route.timeout_s == 30.0
        assert route.balancing == Balancing.BALANCING_LEAST_LATENCY
        assert Route(config(default_timeout_ms=250), 30.0).timeout_s == 0.25

    def test_one_version_with_all_buckets_gets_every_unit(self) -> None:
        route = Route(sole(), 30.0)
        assert {route.assign(f"u{n}".encode()).version for n in range(100)} == {"1"}
        assert route.named("1").propensity == 1.0

    def test_variants_are_stamped_with_their_experiment_and_share(self) -> None:
        made = config(experiments=[experiment("exp_1", cuts=[2500])])
        for variant, version in zip(made.experiments[0].variants, "12", strict=True):
            variant.version = version
        made.fallback.version = "1"
        route = Route(made, 30.0)
        new = route.arm(Assigned(0, 1, b""))
        said = PredictRequest.FromString(new.stamp)
        assert (said.version, said.variant, said.experiment, said.propensity) == ("2", "v1", "exp_1", 0.75)
        assert said.revision == made.revision
        by_hand = route.arm(Assigned(0, 1, b"", overridden=True))
        assert (by_hand.version, by_hand.propensity) == ("2", 1.0)
        assert new.fallback is not None
        stand_in = new.fallback.target
        assert (stand_in.version, stand_in.variant, stand_in.experiment) == ("1", "v1", "exp_1")
        assert route.arm(Assigned(0, 0, b"")).fallback is None  # it is the fallback's own version
        assert Route(config(), 30.0).experiments is None

    def test_an_experiment_that_cannot_be_served_leaves_the_last_good_route(self) -> None:
        table = applied(1)
        wrong = config(revision=2, experiments=[experiment("exp_1")])  # of versions 0 and 1
        with pytest.raises(ValueError, match="variant 'v0' of exp_1 is not served"):
            table.apply(b"cancer", wrong.SerializeToString())
        route = table.find("cancer")
        assert route is not None
        assert route.revision == 1

    @pytest.mark.parametrize("wrong", ["no versions", "twice", "uncovered"])
    def test_what_cannot_be_served_is_refused(self, wrong: str) -> None:
        made = config()
        if wrong == "no versions":
            del made.versions[:]
        elif wrong == "twice":
            made.versions.append(ServedVersion(version="1"))
        else:
            made.buckets[0].CopyFrom(BucketRange(first=1, last=8999, version="1"))
        with pytest.raises(ValueError, match=r"version|bucket"):
            Route(made, 30.0)


class TestTable:
    def test_older_and_equal_revisions_are_ignored(self) -> None:
        table = applied(3)
        route = table.find("cancer")
        table.apply(b"cancer", config(revision=2).SerializeToString())
        table.apply(b"cancer", config(revision=3).SerializeToString())
        assert table.find("cancer") is route
        table.apply(b"cancer", config(revision=4).SerializeToString())
        assert table.find("cancer") is not route

    def test_a_bad_record_leaves_the_last_good_route(self) -> None:
        table = applied(1)
        bad = config(revision=2)
        del bad.buckets[1]
        with pytest.raises(ValueError, match="belongs to no version"):
            table.apply(b"cancer", bad.SerializeToString())
        with pytest.raises(ValueError, match="is about"):
            table.apply(b"digits", config(revision=2).SerializeToString())
        route = table.find("cancer")
        assert route is not None
        assert route.revision == 1
        assert table.find("digits") is None
        # Until one comes that can be served, or none is to be.
        assert table.refused == {"cancer"}
        table.apply(b"cancer", config(revision=3).SerializeToString())
        assert table.refused == set()

    def test_removal_then_a_new_start_at_any_revision(self) -> None:
        table = applied(7)
        table.apply(b"cancer", None)
        assert table.find("cancer") is None
        assert table.records() == {}
        table.apply(b"cancer", config(revision=1).SerializeToString())
        assert len(table) == 1

    def test_hears_of_changes_only(self) -> None:
        heard: list[int] = []
        table = RoutingTable(30.0, lambda: heard.append(1))
        for revision in (1, 1, 2):
            table.apply(b"cancer", config(revision=revision).SerializeToString())
        table.apply(b"digits", None)
        assert len(heard) == 2

    def test_what_only_the_snapshot_knew_ends_when_the_topic_was_read(self) -> None:
        table = RoutingTable(30.0)
        for model in ("cancer", "digits"):
            table.restore(model.encode(), sole(model).SerializeToString())
        table.apply(b"cancer", config(revision=1).SerializeToString())
        table.confirm()
        assert [route.model for route in table] == ["cancer"]

    def test_a_topic_that_lost_everything_ends_nothing(self) -> None:
        table = RoutingTable(30.0)
        table.restore(b"cancer", sole().SerializeToString())
        table.confirm()
        assert table.find("cancer") is not None


def test_a_fallback_is_one_of_the_versions_served() -> None:
    route = Route(config(fallback=Fallback(version="1")), 30)
    assert route.fallback is not None
    assert route.fallback.target.version == "1"
    assert route.fallback.on == FAILURES
    new = next(target for target in route.targets if target.version == "2")
    assert new.fallback is not None
    stand_in = new.fallback.target
    # The unit was given the new version, and counts for it.
    assert (stand_in.version, stand_in.variant, stand_in.propensity) == ("1", new.variant, new.propensity)
    assert PredictRequest.FromString(new.stamp + stand_in.name).variant == new.variant
    assert route.named("1").fallback is None
    only = Route(config(fallback=Fallback(version="1", on=[Code.CODE_INTERNAL])), 30)
    assert only.fallback is not None
    assert only.fallback.on == {Code.CODE_INTERNAL}
    assert Route(config(), 30).fallback is None
    for name in ("7", "champion"):
        with pytest.raises(ValueError, match="fallback"):
            Route(config(fallback=Fallback(version=name)), 30)
