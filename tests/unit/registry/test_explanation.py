"""Why a request gets the variant it gets: the words, and that they follow the router's own decision."""

from __future__ import annotations

from headrace.v1.control_pb2 import Condition, Experiment, LayerRange, Unit, Variant, VariantRange
from headrace.v1.tensor_pb2 import Parameter

from services.common.assignment import Buckets, unit_digest
from services.common.experiments import holdout_salt, layer_salt
from services.registry.explanation import Explained, explain, request_of


def experiment(identity: str = "exp_a", first: int = 0, last: int = 9999, **fields: object) -> Experiment:
    made = Experiment(
        experiment_id=identity,
        unit=Unit.UNIT_USER,
        salt=identity,
        layer=[LayerRange(first=first, last=last)],
        variants=[Variant(name="old", version="1"), Variant(name="new", version="2")],
        buckets=[VariantRange(first=0, last=4999, variant=0), VariantRange(first=5000, last=9999, variant=1)],
    )
    made.MergeFrom(Experiment(**fields))  # type: ignore[arg-type]  # fields of the message
    return made


def asked(unit: str, *experiments: Experiment, holdout: int = 0, **attributes: str) -> Explained:
    request = request_of(unit, "", bytes(16), attributes)
    return explain("churn", experiments, holdout, "exp_a", request, running=True)


def test_a_unit_in_it_is_told_its_buckets() -> None:
    said = asked("alice", experiment())
    bucket = Buckets("exp_a").of(b"alice")
    assert (said.bucket, said.layer_bucket) == (bucket, Buckets(layer_salt("churn")).of(b"alice"))
    assert (said.in_experiment, said.propensity) == (True, 0.5)
    assert (said.variant, said.version) == (("old", "1") if bucket < 5000 else ("new", "2"))
    assert said.because.startswith(f"The user gets variant {said.variant}: its bucket {said.layer_bucket}")
    assert [step.split(":")[0] for step in said.steps] == ["Overrides", "Holdout", "Layer", "Variant"]


def test_an_override_comes_before_everything() -> None:
    digest = int.from_bytes(unit_digest(b"alice"), "little")
    chosen = experiment(override_units=[digest], override_variants=[1])
    said = asked("alice", chosen, holdout=10_000)
    assert (said.in_experiment, said.variant, said.propensity) == (True, "new", 1.0)
    assert said.because == "The user gets variant new: it was chosen for it by hand."
    assert len(said.steps) == 1


def test_why_a_unit_is_not_in_it() -> None:
    german = Condition(
        attribute="country", operator=Condition.OPERATOR_IN, values=[Parameter(string_value="de")]
    )
    said = asked("alice", experiment(targeting=[german]), country="fr")
    assert (said.in_experiment, said.variant, said.version, said.propensity) == (False, None, None, None)
    assert said.because == (
        'The request is not in the experiment: it does not fulfil the condition country in ["de"].'
    )
    held = asked("alice", experiment(), holdout=Buckets(holdout_salt("churn")).of(b"alice") + 1)
    assert held.because == ("The request is not in the experiment: the unit is held out of every experiment.")
    assert held.steps[-1].startswith("Holdout: ")
    bucket = Buckets(layer_salt("churn")).of(b"alice")
    other = experiment("exp_b", bucket, bucket)
    elsewhere = experiment(first=(bucket + 1) % 10_000, last=(bucket + 1) % 10_000)
    assert asked("alice", elsewhere).because.endswith(
        f"bucket {bucket} of the layer is not the experiment's."
    )
    assert asked("alice", elsewhere, other).because.endswith("experiment exp_b gets it.")


def test_what_does_not_run_would() -> None:
    request = request_of("alice", "", bytes(16), {})
    said = explain("churn", [experiment()], 0, "exp_a", request, running=False)
    assert said.because.startswith("The user would get variant ")
    said = explain("churn", [experiment()], 10_000, "exp_a", request, running=False)
    assert said.because.startswith("The request would not be in the experiment: ")
