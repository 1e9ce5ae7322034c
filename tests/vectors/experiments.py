"""Kinds of the experiments side: which public function of services.analytics.statistics answers each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from services.analytics.statistics import (
    bayesian,
    boundaries,
    bounded,
    counts,
    group_sequential,
    means,
    multiple,
    policies,
    power,
    proportions,
    quantiles,
    sequential,
    simulation,
)
from services.analytics.statistics.effects import Arm, Difference, Effect, cuped, effect
from services.analytics.statistics.fixed_horizon import (
    Inference,
    Tails,
    equivalence,
    non_inferiority,
    t_test,
    z_test,
)
from services.analytics.statistics.moments import Moments, PairedMoments
from tests.vectors.cases import Answer, Case, Check, differences

Values = Mapping[str, Any]


def arm(side: Mapping[str, float]) -> Arm:
    """An arm as the file writes it: successes, sums, or the order statistics of a quantile."""
    n = int(side["n"])
    if "successes" in side:
        return Arm.proportion(side["successes"], n)
    if "quantile_hat" in side:
        low, high = side["quantile_lower"], side["quantile_upper"]
        return Arm.quantile(side["quantile_hat"], low, high, n, int(side.get("n_star", n)))
    return Arm.from_moments(Moments.from_sums(n, side["sum"], side["sum_squares"]))


def difference(case: Case) -> Difference:
    """Absolute unless the inputs or the kind say relative."""
    named = str(case.inputs.get("difference", "relative" if case.kind.endswith("relative") else "absolute"))
    return "relative" if named == "relative" else "absolute"


def two_arms(case: Case) -> Effect:
    """The effect of the case's control and treatment."""
    return effect(arm(case.inputs["control"]), arm(case.inputs["treatment"]), difference(case))


def successes(case: Case) -> tuple[tuple[float, int], tuple[float, int]]:
    """(successes, n) of control and treatment; R's prop.test has them as two vectors."""
    if "control" not in case.inputs:
        (s_a, s_b), (n_a, n_b) = case.inputs["vectors"]
        return (s_a, int(n_a)), (s_b, int(n_b))
    control, treatment = (case.inputs[side] for side in ("control", "treatment"))
    return (control["successes"], int(control["n"])), (treatment["successes"], int(treatment["n"]))


def alpha(case: Case) -> float:
    """The error rate."""
    level = case.number("conf.level", "confidence", "ci_level", default=math.nan)
    return case.number("alpha", "sig.level", default=0.05 if math.isnan(level) else 1 - level)


_TAILS: dict[str, Tails] = {
    "larger": "larger",
    "greater": "larger",
    "smaller": "smaller",
    "less": "smaller",
}


def tails(case: Case, *, flipped: bool = False) -> Tails:
    """What the test looks for; `flipped` where the source takes first minus second and we the other way."""
    named = _TAILS.get(case.option("alternative"), "two-sided")
    if flipped and named != "two-sided":
        return "smaller" if named == "larger" else "larger"
    return named


def sides(case: Case) -> int:
    """1 where the case asks for a one-sided test."""
    one = case.option("alternative").replace("_", ".").replace("-", ".") == "one.sided"
    return 1 if one or tails(case) != "two-sided" else int(case.number("sides", default=2))


def from_r(case: Case) -> bool:
    """Whether the numbers come from R."""
    return "r_call" in case.inputs or bool(re.match(r"R\b", case.source))


def spelled(result: Inference) -> dict[str, Any]:
    """A result under the names that the files use."""
    return {
        "estimate": result.estimate,
        "difference": result.estimate,
        "ci": result.ci,
        "p_value": result.p_value,
        "std_error": result.std_error,
        "t": result.statistic,
        "z": result.statistic,
        "df": result.degrees_of_freedom,
        "ci_low": result.ci[0],
        "ci_high": result.ci[1],
    }


def welch_t_test(case: Case) -> Values:
    """R's t.test: first sample minus second."""
    first, second = (case.inputs[side] for side in "ab") if "a" in case.inputs else case.inputs["vectors"]
    a, b = Moments.of(first), Moments.of(second)
    if case.flag("paired"):
        found = means.paired_effect(Moments.of(np.subtract(first, second)))
    elif case.flag("var.equal"):
        found = means.pooled_effect(b, a)
    else:
        found = effect(Arm.from_moments(b), Arm.from_moments(a))
    null = case.number("mu", default=0.0)
    result = t_test(found, alpha=alpha(case), alternative=tails(case), null=null)
    return spelled(result) | {"mean_a": a.mean, "mean_b": b.mean, "mean_difference": result.estimate}


def welch_t_test_arrays(case: Case) -> Values:
    a, b = case.data["a"], case.data["b"]
    wanted = tails(case)
    left, right = Moments.of(a), Moments.of(b)
    if case.option("equal_var") == "True":
        result = t_test(means.pooled_effect(left, right), alpha=alpha(case), alternative=wanted)
    else:
        result = means.welch(left, right, alpha=alpha(case), alternative=wanted)
    ranks = means.mann_whitney(a, b, alternative=wanted)
    return spelled(result) | {
        "diff_ci": result.ci,
        "mean_a": left.mean,
        "mean_b": right.mean,
        "mannwhitney_p": ranks.p_value,
        "mannwhitney_u": ranks.statistic,
    }


def sample_size_two_proportions(case: Case) -> Values:
    p1, p2 = float(case.inputs["p1"]), float(case.inputs["p2"])
    options: dict[str, Any] = {
        "power": case.number("power", default=0.8),
        "alpha": alpha(case),
        "sides": sides(case),
        "ratio": case.number("ratio", default=1.0),
    }
    pooled = power.sample_size_two_proportions(p1, p2, **options, strict=case.flag("strict"))
    return {
        "n": pooled,
        "n_per_group": pooled,
        "n_pooled_normal": pooled,
        "n_arcsine": power.sample_size_arcsine(p1, p2, **options),
    }


def power_two_proportions(case: Case) -> Values:
    given = case.inputs
    reached = power.power_two_proportions(
        float(given["n"]),
        float(given["p1"]),
        float(given["p2"]),
        alpha=alpha(case),
        sides=sides(case),
        ratio=case.number("ratio", default=1.0),
        strict=case.flag("strict"),
    )
    return {"power": reached}


def samples(case: Case) -> int:
    """1 for a one-sample or paired t-test."""
    return 1 if case.option("type").replace("-", ".") in ("one.sample", "paired") else 2


def sample_size_mean(case: Case) -> Values:
    needed = power.sample_size_mean(
        case.number("delta", default=1.0),
        case.number("sd", default=1.0),
        power=case.number("power", default=0.8),
        alpha=alpha(case),
        sides=sides(case),
        samples=samples(case),
        ratio=case.number("ratio", default=1.0),
        strict=case.flag("strict"),
    )
    return {"n_per_group": needed, "n": needed}


def power_mean(case: Case) -> Values:
    reached = power.power_mean(
        float(case.inputs["n"]),
        case.number("delta", default=1.0),
        case.number("sd", default=1.0),
        alpha=alpha(case),
        sides=sides(case),
        samples=samples(case),
        ratio=case.number("ratio", default=1.0),
        strict=case.flag("strict"),
    )
    return {"power": reached}


def r_corrects(case: Case) -> bool:
    """R's prop.test and chisq.test correct for continuity unless told otherwise."""
    return from_r(case) and case.flag("correct", default=True)


def two_proportion_z_test(case: Case) -> Values:
    control, treatment = successes(case)
    result = proportions.two_proportion_z_test(
        control,
        treatment,
        alpha=alpha(case),
        continuity=r_corrects(case),
        alternative=tails(case, flipped=from_r(case)),
    )
    return {
        "z": result.z,
        "z_abs": abs(result.z),
        "chi2": result.z**2,
        "p_value": result.p_value,
        "estimate": result.estimate,
        "wald_ci": result.wald_ci,
        "newcombe_ci": result.newcombe_ci,
        # R writes first minus second.
        "diff_ci_low": -result.wald_ci[1],
        "diff_ci_high": -result.wald_ci[0],
        "p_a": result.p_control,
        "p_b": result.p_treatment,
    }


def chi_square(result: counts.CountTest) -> Values:
    return {"chi2": result.chi2, "df": result.degrees_of_freedom, "p_value": result.p_value}


def k_proportions(case: Case) -> Values:
    wins, totals = case.inputs["vectors"]
    if len(wins) == 2 and r_corrects(case):
        table = np.vstack((wins, np.subtract(totals, wins)))
        return chi_square(counts.contingency(table, continuity=True))
    return chi_square(proportions.k_proportions(wins, totals))


def r_table(case: Case) -> np.ndarray:
    """Rows as R was given them, or as its `matrix` lays one vector out."""
    rows = case.inputs["vectors"]
    if len(rows) > 1:
        return np.asarray(rows, dtype=np.float64)
    values = np.asarray(rows[0], dtype=np.float64)
    wide = int(case.number("ncol", default=0))
    high = int(case.number("nrow", default=values.size // wide if wide else 1))
    return values.reshape((high, values.size // high), order="C" if case.flag("byrow") else "F")


def srm_chi_square(case: Case) -> Values:
    if "users" in case.inputs:
        users = case.inputs["users"]
        weights = case.inputs.get("weights", [1.0] * len(users))
        return chi_square(counts.sample_ratio(users, weights))
    observed, *shares = case.inputs["vectors"]
    return chi_square(counts.sample_ratio(observed, shares[0] if shares else [1.0] * len(observed)))


def categorical_chi_square(case: Case) -> Values:
    return chi_square(counts.contingency(r_table(case), continuity=r_corrects(case)))


_R_METHODS = {
    "bh": "bh",
    "fdr": "bh",
    "by": "by",
    "fdr_bh": "bh",
    "fdr_by": "by",
    "simes-hochberg": "hochberg",
}


def multiple_testing(case: Case) -> Values:
    values = case.inputs["p_values"] if "p_values" in case.inputs else case.inputs["vectors"][0]
    named = case.option("method") or case.pattern(r"p\.adjust\(.*?\)\s*,\s*['\"]([\w-]+)['\"]", "")
    usual = "holm" if from_r(case) else "fdr_bh"  # R's own default; ours of old for other sources
    named = (named or case.pattern(r"multipletests\(['\"]?([\w-]+)['\"]?\)", usual)).lower()
    method = _R_METHODS.get(named, named)
    if method not in get_args(multiple.Correction):
        raise ValueError(f"unknown correction {named}")
    result = multiple.adjust(values, method, alpha=case.number("q", "alpha", default=0.05))  # type: ignore[arg-type] # checked above
    answers: dict[str, Any] = {f"p{place}": p for place, p in enumerate(result.p_values, start=1)}
    return answers | {
        "adjusted": result.p_values,
        "rejected": result.rejected,
        "rejections": int(result.rejected.sum()),
    }


def two_sided_test(case: Case) -> Values:
    return spelled(t_test(two_arms(case), alpha=alpha(case), alternative=one_sided(case)))


def one_sided(case: Case) -> Tails:
    """GrowthBook names its one-sided tests for the alternative."""
    if "OneSidedTreatmentGreater" in case.source:
        return "larger"
    return "smaller" if "OneSidedTreatmentLesser" in case.source else tails(case)


def sequential_asymptotic_cs(case: Case) -> Values:
    tuning = case.number("tuning_n", default=sequential.DEFAULT_TUNING_N)
    return spelled(sequential.asymptotic_sequence(two_arms(case), alpha=alpha(case), tuning_n=tuning))


def bayesian_two_proportion(case: Case) -> Values:
    words = str(case.inputs.get("prior_on_effect", "flat"))
    prior = None
    if not words.startswith("flat"):
        mean = re.search(r"mean\s+(-?[\d.]+)", words)
        sd = re.search(r"(?:sd|std|scale)\s+([\d.]+)", words)
        if mean is None or sd is None:
            raise ValueError(f"cannot read the prior {words!r}")
        prior = bayesian.NormalPrior(float(mean.group(1)), float(sd.group(1)))
    level = case.number("ci_level", default=0.95)
    result = bayesian.posterior(two_arms(case), prior, level=level)
    return {
        "estimate": result.estimate,
        "ci": result.ci,
        "chance_to_win": result.chance_to_win,
        "risk": [result.risk_control, result.risk_treatment],
        "posterior_sd": result.sd,
    }


def bayesian_beta_binomial(case: Case) -> Values:
    control, treatment = successes(case)
    prior = case.inputs.get("prior", [1, 1])
    answers = {"prob_b_beats_a": bayesian.beta_chance_to_win(control, treatment, (prior[0], prior[1]))}
    if all(float(value).is_integer() for value in (*prior, control[0], treatment[0])):
        whole = (int(prior[0]), int(prior[1]))
        answers["closed_form"] = bayesian.beta_chance_to_win_closed(
            (int(control[0]), control[1]), (int(treatment[0]), treatment[1]), whole
        )
    return answers


def cuped_test(case: Case) -> Values:
    control = PairedMoments.of(case.data["post_a"], case.data["pre_a"])
    treatment = PairedMoments.of(case.data["post_b"], case.data["pre_b"])
    result = cuped(control, treatment, difference(case))
    return spelled(t_test(result.adjusted, alpha=alpha(case))) | {
        "theta": result.theta,
        "unadjusted_std_error": result.unadjusted.std_error,
        "variance_reduction": result.variance_reduction,
    }


def ratio_metric(case: Case) -> Values:
    arms = [Arm.ratio(PairedMoments.of(case.data[f"num_{side}"], case.data[f"den_{side}"])) for side in "ab"]
    return spelled(t_test(effect(arms[0], arms[1], difference(case)), alpha=alpha(case)))


def z_test_difference(case: Case) -> Values:
    return spelled(z_test(two_arms(case), alpha=alpha(case), alternative=tails(case)))


def chi_square_difference(case: Case) -> Values:
    result = proportions.two_proportion_z_test(*successes(case), alpha=alpha(case), alternative=tails(case))
    return {"difference": result.estimate, "ci": result.wald_ci, "p_value": result.p_value}


def wilson_interval(case: Case) -> Values:
    return {"ci": proportions.wilson(case.inputs["successes"], int(case.inputs["n"]), alpha=alpha(case))}


def non_inferiority_proportion(case: Case) -> Values:
    margin = case.number("margin", "value", default=0.0)
    arms = two_arms(case)
    if case.option("method").startswith("agresti"):
        adjusted = [Arm.proportion(s + 1, n + 2) for s, n in successes(case)]
        arms = effect(adjusted[0], adjusted[1])
    result = non_inferiority(arms, margin, alternative="smaller" if tails(case) == "smaller" else "larger")
    return {"z": result.statistic, "statistic": result.statistic, "p_value": result.p_value}


def tost_equivalence(case: Case) -> Values:
    a, b = (Moments.of(case.data[side]) for side in "ab")
    found = effect(Arm.from_moments(a), Arm.from_moments(b))
    if case.option("usevar") == "pooled":
        found = means.pooled_effect(a, b)
    result = equivalence(found, float(case.inputs["low"]), case.number("upp", "high", default=math.nan))
    return {"p_value": result.p_value, "p_low": result.p_above_low, "p_upp": result.p_below_high}


def aa_simulation(case: Case) -> Values:
    result = simulation.false_positives(
        np.random.default_rng(int(case.pattern(r"default_rng\((\d+)\)", "0"))),
        runs=int(case.pattern(r"each of (\d+) simulations", "2000")),
        units=int(case.pattern(r"rng\.normal\(0,\s*1,\s*(\d+)\)", "5000")),
        look_every=int(case.pattern(r"after every (\d+) units", "250")),
        alpha=float(case.pattern(r"alpha ([\d.]*\d)", "0.05")),
        tuning_n=float(case.pattern(r"tuning_n (\d+)", "5000")),
    )
    return {
        "naive_fpr": result.naive,
        "fixed_horizon_fpr": result.fixed_horizon,
        "sequential_fpr": result.sequential,
    }


def aa_limits(case: Case, answer: Values) -> list[str]:
    """An always-valid test keeps its promise within the noise of the simulation."""
    runs = int(case.pattern(r"each of (\d+) simulations", "2000"))
    problems = differences(case, answer)
    limit = 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    if answer["sequential_fpr"] > limit:
        problems.append(f"sequential_fpr above {limit:.4f}")
    return problems


def bandit_top_two(case: Case) -> Values:
    draws = case.data["y"]
    return {"weights": policies.top_two_weights(-draws if case.flag("inverse") else draws)}


def confidence_sequence_boundary(case: Case) -> Values:
    given = case.inputs
    times = np.atleast_1d(given["intrinsic_time_v"]).tolist()
    alpha_opt = case.number("alpha_opt", default=0.05)
    c, error = case.number("c", default=0.0), alpha(case)

    def bound(v: float) -> float:
        if "v_min" in given:
            s, eta = case.number("s", default=1.4), case.number("eta", default=2.0)
            return boundaries.poly_stitching(v, error, v_min=float(given["v_min"]), c=c, s=s, eta=eta)
        v_opt = float(given["v_opt"])
        if "gamma_exponential" in case.source:
            return boundaries.gamma_exponential(v, error, v_opt=v_opt, c=c, alpha_opt=alpha_opt)
        if "gamma_poisson" in case.source:
            return boundaries.gamma_poisson(v, error, v_opt=v_opt, c=c, alpha_opt=alpha_opt)
        one_sided = case.flag("is_one_sided", default=True)
        if "beta_binomial" in case.source:
            mixture = boundaries.BetaBinomialMixture(
                v_opt, g=float(given["g"]), h=float(given["h"]), alpha_opt=alpha_opt, one_sided=one_sided
            )
            return mixture.bound(v, error)
        return boundaries.normal_mixture(v, error, v_opt=v_opt, alpha_opt=alpha_opt, one_sided=one_sided)

    return {"bound": [bound(v) for v in times]}


def mixture_rho(case: Case) -> float:
    """rho of log_mixture = log(rho / (V + rho)) / 2 + S² / (2 (V + rho)), which is confseq's: the one that is
    given as such, else the best one for v_opt. Raises ValueError naming the field."""
    given, best = case.inputs, None
    if given.get("v_opt") is not None:
        best = boundaries.best_rho(float(given["v_opt"]), case.number("alpha_opt", default=0.05))
    name = next((name for name in ("rho_used", "rho") if given.get(name) is not None), None)
    if name is None:
        if best is None:
            raise ValueError("v_opt: neither it nor rho_used is given, and nothing else says how to mix")
        return best
    values = np.unique(np.asarray(given[name], dtype=float))
    if values.size != 1 or not 0 < values[0] < np.inf:
        raise ValueError(f"{name}: one positive number is wanted, of all looks, not {given[name]!r}")
    return float(values[0])


def msprt(case: Case) -> Values:
    rho = mixture_rho(case)
    ratios, p_values = sequential.msprt_p_values(
        case.inputs["S_cumulative_deviation"], case.inputs["V_variance_time"], rho=rho
    )
    return {
        "log_mixture": ratios,
        "p_value": p_values,
        "running_min_p": sequential.running_minimum(p_values),
    }


def bernoulli_sequence(case: Case) -> Values:
    given = case.inputs
    limits = bounded.bernoulli(
        given["successes"],
        int(given["trials"]),
        alpha=alpha(case),
        t_opt=float(given["t_opt"]),
        alpha_opt=case.number("alpha_opt", default=0.05),
    )
    return {"ci": limits}


def intersected(case: Case, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tightest limits so far, where the case asks for them."""
    if not case.flag("running_intersection"):
        return low, high
    return np.maximum.accumulate(low), np.minimum.accumulate(high)


def betting_sequence(case: Case) -> Values:
    breaks = int(case.number("breaks", default=float(case.pattern(r"breaks=(\d+)", "1000"))))
    most = case.number("trunc_scale", "m_trunc", default=0.5)
    low, high = bounded.betting(case.data["x"], alpha=alpha(case), breaks=breaks, most=most)
    low, high = intersected(case, low, high)
    places = np.asarray(case.inputs["at"]) - 1
    return {"lower": low[places], "upper": high[places]}


def empirical_bernstein_sequence(case: Case) -> Values:
    low, high = bounded.empirical_bernstein(case.data["x"], alpha=alpha(case))
    low, high = intersected(case, low, high)
    places = np.asarray(case.inputs["at"]) - 1
    return {"lower": low[places], "upper": high[places]}


def quantile_ab(case: Case) -> Values:
    given = case.inputs
    p_value = quantiles.quantile_p_value(
        case.data["a"],
        case.data["b"],
        float(given["quantile_p"]),
        t_opt=float(given["t_opt"]),
        alpha_opt=case.number("alpha_opt", default=0.05),
    )
    return {"p_value": p_value}


def sequential_srm(case: Case) -> Values:
    concentration = case.number("dirichlet_concentration_k", default=10_000.0)
    if isinstance(case.inputs.get("dirichlet_concentration"), int | float):
        concentration = float(case.inputs["dirichlet_concentration"])
    odds, running = sequential.sequential_sample_ratio(
        np.cumsum(case.inputs["counts_per_look"], axis=0).tolist(),
        case.inputs["null_probabilities"],
        concentration=concentration,
    )
    return {"inverse_posterior_odds_per_look": odds, "running_p": running, "p_values_running": running}


def group_sequential_bounds(case: Case) -> Values:
    words = case.option("spending").lower().replace("-", "_")
    if "brien" in words or words == "obf":
        spending: group_sequential.Spending = group_sequential.obrien_fleming_spending
    elif "pocock" in words:
        spending = group_sequential.pocock_spending
    else:
        spending = group_sequential.power_spending(case.number("rho_spending_power", default=2.0))
    found = group_sequential.bounds(
        case.inputs["information_fractions"], alpha=alpha(case), spending=spending, sides=sides(case)
    )
    return {"z_bounds": found}


def off_policy_evaluation(case: Case) -> Values:
    made = case.data
    clip = case.number("clip", "lambda_", default=math.inf)
    found = policies.off_policy(
        made["action"],
        made["reward"],
        made["pscore"],
        made["pe"],
        made.get("qhat"),
        clip=None if math.isinf(clip) else clip,
    )
    answers = {
        "ips": found.ips,
        "snips": found.snips,
        "dr": found.dr,
        "dm": found.dm,
        "ips_std_error": found.ips_std_error,
        "effective_n": found.effective_n,
    }
    if "q" in made:  # the truth, known here since the recipe made the rewards
        truth = policies.off_policy(made["action"], made["reward"], made["pscore"], made["pe"], made["q"])
        answers["truth_on_these_contexts"] = truth.dm
    return answers


ANSWERS: dict[str, Answer] = {
    "welch_t_test": welch_t_test,
    "welch_t_test_arrays": welch_t_test_arrays,
    "sample_size_two_proportions": sample_size_two_proportions,
    "power_two_proportions": power_two_proportions,
    "sample_size_mean": sample_size_mean,
    "power_mean": power_mean,
    "two_proportion_z_test": two_proportion_z_test,
    "k_proportions_chi_square": k_proportions,
    "srm_chi_square": srm_chi_square,
    "categorical_chi_square": categorical_chi_square,
    "multiple_testing": multiple_testing,
    "two_sided_test_proportion_absolute": two_sided_test,
    "two_sided_test_proportion_relative": two_sided_test,
    "two_sided_test_mean_absolute": two_sided_test,
    "two_sided_test_mean_relative": two_sided_test,
    "quantile_treatment_effect": two_sided_test,
    "sequential_asymptotic_cs": sequential_asymptotic_cs,
    "bayesian_two_proportion": bayesian_two_proportion,
    "bayesian_beta_binomial": bayesian_beta_binomial,
    "cuped": cuped_test,
    "ratio_metric_delta_method": ratio_metric,
    "z_test_difference": z_test_difference,
    "chi_square_difference": chi_square_difference,
    "wilson_interval": wilson_interval,
    "non_inferiority_proportion": non_inferiority_proportion,
    "tost_equivalence": tost_equivalence,
    "aa_simulation": aa_simulation,
    "bandit_top_two_weights": bandit_top_two,
    "confidence_sequence_boundary": confidence_sequence_boundary,
    "msprt_always_valid_p": msprt,
    "bernoulli_confidence_sequence": bernoulli_sequence,
    "betting_confidence_sequence": betting_sequence,
    "empirical_bernstein_confidence_sequence": empirical_bernstein_sequence,
    "anytime_valid_quantile_ab": quantile_ab,
    "sequential_srm": sequential_srm,
    "group_sequential_bounds": group_sequential_bounds,
    "off_policy_evaluation": off_policy_evaluation,
}

CHECKS: dict[str, Check] = {"aa_simulation": aa_limits}
