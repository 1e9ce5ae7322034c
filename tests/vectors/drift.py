"""Kinds of the drift side: which public function of services.drift.detectors answers each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from services.drift.detectors import (
    binning,
    categorical,
    distances,
    features,
    ks,
    multivariate,
    online,
    performance,
    psi,
    sketches,
)
from tests.vectors.cases import PROSE, Answer, Case, Check, differences

Values = Mapping[str, Any]

#: Evidently takes a numeric column of so few distinct values as categories.
_FEW_VALUES = 20


def samples(case: Case) -> tuple[Any, Any]:
    """Reference and current."""
    return case.data["ref"], case.data["cur"]


def joint_shares(case: Case) -> tuple[binning.Floats, binning.Floats]:
    """Evidently's bins: Sturges over both samples, or one a value for few values."""
    reference, current = samples(case)
    if "categorical" in case.kind or np.unique(reference).size <= _FEW_VALUES:
        return binning.category_shares(reference, current)
    return binning.joint_shares(reference, current)


def filled_shares(case: Case) -> tuple[binning.Floats, binning.Floats]:
    """The same with zero shares replaced."""
    reference, current = joint_shares(case)
    return binning.fill_zero_shares(reference), binning.fill_zero_shares(current)


def alternative(case: Case) -> ks.Alternative:
    """As the source names it; alibi-detect's tests say it in words."""
    named = case.option("alternative")
    if named in ("greater", "less"):
        return "greater" if named == "greater" else "less"
    return "two-sided"


def ks_two_sample(case: Case) -> Values:
    reference, current = case.inputs["vectors"]
    usual = len(reference) * len(current) < 10_000  # R's own choice
    exact = usual if case.option("exact", default="NULL") == "NULL" else case.flag("exact")
    result = ks.ks_two_sample(
        reference, current, method="exact" if exact else "limit", alternative=alternative(case)
    )
    return {"D": result.statistic, "p_value": result.p_value}


def ks_large(case: Case) -> Values:
    result = ks.ks_two_sample(*samples(case), method="asymp")
    return {"D": result.statistic, "p_value": result.p_value, "alerts": result.is_material()}


def ks_large_silent(case: Case, answer: Values) -> list[str]:
    """A tiny shift must not alarm, however significant it is."""
    problems = differences(case, answer)
    if answer["D"] < 0.01 and answer["alerts"]:
        problems.append("alerts on a shift that nobody would notice")
    return problems


def psi_from_shares(case: Case) -> Values:
    given = case.inputs
    result = psi.psi_from_shares(
        given["expected_shares"], given["actual_shares"], given["n_reference"], given["n_current"]
    )
    return {
        "psi": result.value,
        "crit95": result.critical_95,
        "crit99": result.critical_99,
        "p_value_chi2": result.p_value,
        "expected_psi_under_null": result.expected_under_null,
    }


def psi_small_sample_bias(case: Case) -> Values:
    bins = int(case.pattern(r"\[1/\d+\]\*(\d+)", "10"))
    n_reference = int(case.pattern(r"a=rng\.multinomial\((\d+)", "2000"))
    n_current = int(case.pattern(r"b=rng\.multinomial\((\d+)", "200"))
    critical = psi.critical_value(bins, n_reference, n_current)
    mean, above = psi.share_above_under_null(
        n_reference,
        n_current,
        [0.1, 0.2, critical],
        bins=bins,
        draws=int(case.pattern(r"(\d+) times", "4000")),
        rng=np.random.default_rng(int(case.pattern(r"default_rng\((\d+)\)", "0"))),
        floor=float(case.pattern(r"floor both at ([\d.e-]+\d)", "1e-4")),
    )
    return {
        "mean_psi": mean,
        "chi2_mean": (bins - 1) * (1 / n_reference + 1 / n_current),
        "share_above_0.1": above[0],
        "share_above_0.2": above[1],
        "share_above_chi2_crit95": above[2],
    }


def numeric_psi(case: Case) -> Values:
    return {"value": psi.index(*filled_shares(case))}


def psi_equal_width(case: Case) -> Values:
    smallest = float(np.finfo(float).tiny)
    shares = [np.maximum(side, smallest) for side in binning.joint_shares(*samples(case), 10)]
    return {"value": psi.index(*shares)}


def numeric_ks(case: Case) -> Values:
    return {"value": ks.ks_two_sample(*samples(case)).p_value}


def numeric_ks_distance(case: Case) -> Values:
    return {"value": ks.ks_two_sample(*samples(case)).statistic}


def joint_jensen_shannon(case: Case) -> Values:
    # Evidently keeps scipy's natural logarithm.
    return {"value": distances.jensen_shannon(*joint_shares(case), base=math.e)}


def reference_jensen_shannon(case: Case) -> Values:
    return {"value": distances.jensen_shannon(*binning.reference_shares(*samples(case)))}


def hellinger(case: Case) -> Values:
    if "doane" in case.words:
        return {"value": distances.hellinger(*binning.reference_shares(*samples(case)))}
    return {"value": distances.hellinger(*joint_shares(case))}


def kullback_leibler(case: Case) -> Values:
    return {"value": distances.kullback_leibler(*filled_shares(case))}


def wasserstein(case: Case) -> Values:
    if "std(ref)" in case.words:
        return {"value": distances.normalised_wasserstein(*samples(case))}
    return {"value": distances.wasserstein(*samples(case))}


def chi_square_fit(case: Case) -> Values:
    return {"value": categorical.chi_square_fit(*binning.category_counts(*samples(case))).p_value}


def chi_square_two_sample(case: Case) -> Values:
    result = categorical.chi_square_two_sample(*binning.category_counts(*samples(case)))
    return {"p_value": result.p_value, "statistic": result.statistic}


def fisher_exact(case: Case) -> Values:
    wanted = alternative(case)
    if wanted == "two-sided" and (said := re.search(r"\b(greater|less)\b", case.source)):
        wanted = "greater" if said.group(1) == "greater" else "less"
    return {"p_value": categorical.fisher_exact(*samples(case), alternative=wanted).p_value}


def cramer_von_mises(case: Case) -> Values:
    reference, current = samples(case)
    columns = [
        -1 if case.inputs.get(name, 0) == "last" else int(case.inputs.get(name, 0))
        for name in ("ref_column", "cur_column")
    ]
    if np.ndim(reference) == 2:
        reference, current = reference[:, columns[0]], current[:, columns[1]]
    result = categorical.cramer_von_mises(reference, current)
    return {"p_value": result.p_value, "statistic": result.statistic}


def multi_feature_ks(case: Case) -> Values:
    correction: features.Correction = "bonferroni" if case.kind.endswith("bonferroni") else "fdr"
    level = case.number("q", default=0.05)
    result = features.ks_features(*samples(case), level=level, correction=correction, method="asymp")
    return {
        "is_drift": int(result.is_drift),
        "p_values": result.p_values,
        "distances": result.distances,
        "threshold": result.threshold,
    }


def cbpe(case: Case) -> Values:
    made = case.data
    found = performance.confidence_based_estimate(made["p_ref"], made["y_ref"], made["p_cur"])
    predicted = np.asarray(made["p_cur"]) >= 0.5
    return {
        "accuracy": found.accuracy,
        "roc_auc": found.roc_auc,
        "f1": found.f1,
        "realised": {
            "accuracy": accuracy_score(made["y_cur"], predicted),
            "roc_auc": roc_auc_score(made["y_cur"], made["p_cur"]),
            "f1": f1_score(made["y_cur"], predicted),
        },
    }


def cbpe_is_close(case: Case, answer: Values) -> list[str]:
    """The estimate lies near what the hidden labels say."""
    return differences(case, answer) + [
        f"{name}: {answer[name]:.4f} estimated, {realised:.4f} realised"
        for name, realised in answer["realised"].items()
        if abs(answer[name] - realised) >= 0.015
    ]


def pca_reconstruction(case: Case) -> Values:
    fitted = multivariate.PcaReconstruction.fit(case.data["ref"])
    return {name: fitted.error(case.data[name]) for name in case.expected if name in case.data}


def domain_classifier(case: Case) -> Values:
    return {
        name: multivariate.domain_classifier_auc(case.data["ref"], case.data[name])
        for name in case.expected
        if name in case.data
    }


def domain_classifier_limits(case: Case, answer: Values) -> list[str]:
    """Another classifier may find more drift, and must find none where there is none."""
    slack, problems = float(case.tolerance["abs"]), []
    for name, wanted in case.expected.items():
        if name in PROSE:
            continue
        found = answer[name]
        good = abs(found - 0.5) <= slack if abs(wanted - 0.5) <= slack else found >= wanted - slack
        if not good:
            problems.append(f"{name}: {found!r} against {wanted!r}")
    return problems


def mmd(case: Case) -> Values:
    return {
        "mmd2": multivariate.mmd2(case.data["X"], case.data["Y"], sigma=case.number("sigma", default=1.0))
    }


def adwin(case: Case) -> Values:
    detector = online.Adwin(restart=True, **case.inputs.get("params", {}))
    return {
        "detection_indices": [place for place, value in enumerate(case.data["x"]) if detector.update(value)]
    }


def page_hinkley(case: Case) -> Values:
    detector = online.PageHinkley(**case.inputs.get("params", {}))
    return {
        "detection_indices": [place for place, value in enumerate(case.data["x"]) if detector.update(value)]
    }


def detected_in_time(case: Case, answer: Values) -> list[str]:
    """No alarm before the change, the first one after it about where the source has its own."""
    found, change = answer["detection_indices"], int(case.number("change_point", default=0))
    expected = [place for place in case.expected["detection_indices"] if place >= change]
    problems = [f"alarm at {place}, before the change" for place in found if place < change]
    after = [place for place in found if place >= change]
    slack = int(case.tolerance.get("first_detection_abs", 50))
    if not expected:
        return problems + [f"alarm at {place}" for place in after[:1]]
    if not after or abs(after[0] - expected[0]) > slack:
        problems.append(f"first alarm at {after[0] if after else None} instead of {expected[0]}")
    return problems


def mergeable_sketch(case: Case) -> Values:
    parts = int(case.pattern(r"array_split\(x,\s*(\d+)\)", "8"))
    first = int(case.pattern(r"first (\d+) of each shard", "5000"))
    shards = np.array_split(np.asarray(case.data["x"], dtype=np.float64), parts)
    by_rank, by_value = sketches.QuantileSketch(), sketches.RelativeSketch(0.01)
    for shard in shards:
        by_rank.merge(sketches.QuantileSketch.from_bytes(sketches.QuantileSketch.of(shard).to_bytes()))
        part = sketches.RelativeSketch(0.01)
        part.update(shard[:first])
        by_value.merge(part)
    wanted = case.inputs["quantiles"]
    ordered = np.sort(np.concatenate(shards))
    returned = by_rank.quantiles(wanted)
    subset = np.sort(np.concatenate([shard[:first] for shard in shards]))
    return {
        "exact_quantiles": np.quantile(ordered, wanted),
        "exact_quantiles_subset": np.quantile(subset, wanted),
        "true_ranks": np.searchsorted(ordered, returned, side="right") / ordered.size,
        "relative": by_value.quantiles(wanted),
        "rank_error": by_rank.rank_error,
        "serialized_bytes": len(by_rank.to_bytes()),
    }


def sketch_errors(case: Case, answer: Values) -> list[str]:
    """Rank error of the one sketch, relative error of the other, each within its promise."""
    wanted = np.asarray(case.inputs["quantiles"], dtype=np.float64)
    rank_errors = np.abs(answer["true_ranks"] - wanted)
    relative = np.abs(answer["relative"] / answer["exact_quantiles_subset"] - 1)
    problems = [
        f"rank of {q}: off by {e:.4f}"
        for q, e in zip(wanted, rank_errors, strict=True)
        if e > case.tolerance["rank_abs"]
    ]
    problems += [
        f"value at {q}: off by {e:.2%}"
        for q, e in zip(wanted, relative, strict=True)
        if e > case.tolerance["relative"]
    ]
    if not np.allclose(answer["exact_quantiles"], case.expected["exact_quantiles"], rtol=1e-9):
        problems.append("other data than the file's author had")
    return problems


ANSWERS: dict[str, Answer] = {
    "ks_two_sample": ks_two_sample,
    "ks_large_n_effect_size": ks_large,
    "psi_from_shares": psi_from_shares,
    "psi_small_sample_bias": psi_small_sample_bias,
    "drift_numeric_psi": numeric_psi,
    "drift_categorical_psi": numeric_psi,
    "drift_numeric_psi_equal_width10": psi_equal_width,
    "drift_numeric_ks": numeric_ks,
    "drift_numeric_kolmogorov_smirnov": numeric_ks_distance,
    "drift_numeric_jensenshannon": joint_jensen_shannon,
    "drift_categorical_jensenshannon": joint_jensen_shannon,
    "drift_numeric_jensen_shannon": reference_jensen_shannon,
    "drift_numeric_hellinger": hellinger,
    "drift_numeric_kl_div": kullback_leibler,
    "drift_numeric_wasserstein": wasserstein,
    "drift_categorical_chisquare": chi_square_fit,
    "categorical_chi_square_two_sample": chi_square_two_sample,
    "fisher_exact": fisher_exact,
    "cramer_von_mises": cramer_von_mises,
    "multi_feature_ks_fdr": multi_feature_ks,
    "multi_feature_ks_bonferroni": multi_feature_ks,
    "performance_estimation_cbpe": cbpe,
    "multivariate_pca_reconstruction": pca_reconstruction,
    "multivariate_domain_classifier": domain_classifier,
    "multivariate_mmd": mmd,
    "online_adwin": adwin,
    "online_pagehinkley": page_hinkley,
    "mergeable_sketch": mergeable_sketch,
}

CHECKS: dict[str, Check] = {
    "ks_large_n_effect_size": ks_large_silent,
    "performance_estimation_cbpe": cbpe_is_close,
    "multivariate_domain_classifier": domain_classifier_limits,
    "online_adwin": detected_in_time,
    "online_pagehinkley": detected_in_time,
    "mergeable_sketch": sketch_errors,
}
