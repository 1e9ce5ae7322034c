"""Time-uniform boundaries: a sum S with intrinsic time V crosses them with probability alpha, ever.

Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals
of Statistics 49(2), 2021; numbers of propositions below are of that paper. A mixture bound is the s at which
the mixture's log martingale reaches ln(1 / alpha).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize, special


def best_rho(v_opt: float, alpha_opt: float, *, one_sided: bool = False) -> float:
    """Mixture precision that makes the boundary about tightest at intrinsic time `v_opt` (Prop. 3):
    v / (2 ln(1/a) + ln(1 + 2 ln(1/a))), with 2 a for a one-sided boundary.
    """
    rate = 2 * math.log(1 / (2 * alpha_opt if one_sided else alpha_opt))
    return v_opt / (rate + math.log1p(rate))


def normal_mixture_log(s: float, v: float, *, rho: float, one_sided: bool) -> float:
    """Log of the normal mixture martingale; one-sided mixes over the half normal (Prop. 5 and 6)."""
    two_sided = 0.5 * math.log(rho / (v + rho)) + s * s / (2 * (v + rho))
    if not one_sided:
        return two_sided
    return two_sided + math.log(2) + float(special.log_ndtr(s / math.sqrt(v + rho)))


def normal_mixture(
    v: float, alpha: float, *, v_opt: float, alpha_opt: float = 0.05, one_sided: bool = False
) -> float:
    """Boundary for sub-Gaussian sums; the two-sided one has a closed form (eq. 14)."""
    rho = best_rho(v_opt, alpha_opt, one_sided=one_sided)
    if not one_sided:
        return math.sqrt((v + rho) * (math.log1p(v / rho) + 2 * math.log(1 / alpha)))
    return _crossing(lambda s: normal_mixture_log(s, v, rho=rho, one_sided=True), v, alpha)


def gamma_exponential(v: float, alpha: float, *, v_opt: float, c: float, alpha_opt: float = 0.05) -> float:
    """One-sided boundary for sub-exponential sums of scale `c` (Prop. 9)."""
    rho, square = best_rho(v_opt, alpha_opt, one_sided=True), c * c
    shape = rho / square
    leading = shape * math.log(shape) - special.gammaln(shape) - math.log(special.gammainc(shape, shape))

    def log_mixture(s: float) -> float:
        order, point = (v + rho) / square, (c * s + v) / square
        return float(
            leading
            + special.gammaln(order)
            + math.log(special.gammainc(order, point + shape))
            - order * math.log(point + shape)
            + point
        )

    return _crossing(log_mixture, v, alpha)


def gamma_poisson(v: float, alpha: float, *, v_opt: float, c: float, alpha_opt: float = 0.05) -> float:
    """One-sided boundary for sub-Poisson sums of scale `c` (Prop. 10)."""
    rho, square = best_rho(v_opt, alpha_opt, one_sided=True), c * c
    shape = rho / square
    leading = shape * math.log(shape) - special.gammaln(shape) - math.log(special.gammaincc(shape, shape))

    def log_mixture(s: float) -> float:
        point = (v + rho) / square
        order = s / c + point
        tail = special.gammaincc(order, point)
        return float(leading + special.gammaln(order) + math.log(tail) - order * math.log(point) + v / square)

    return _crossing(log_mixture, v, alpha)


class BetaBinomialMixture:
    """Martingale for sums of values that are -g or h around a mean of zero (Prop. 7), two-sided unless
    `one_sided`. For a coin of bias p: g = p, h = 1 - p, S = successes - p n, V = p (1 - p) n.
    """

    def __init__(
        self, v_opt: float, *, g: float, h: float, alpha_opt: float = 0.05, one_sided: bool = False
    ) -> None:
        self._g, self._h, self._one_sided = g, h, one_sided
        self._r = max(best_rho(v_opt, alpha_opt, one_sided=one_sided) - g * h, 1e-3 * g * h)
        self._normalizer = self._log_beta(self._r / (g * (g + h)), self._r / (h * (g + h)))

    def log(self, s: float, v: float) -> float:
        """Log of the martingale at sum `s` and intrinsic time `v`."""
        g, h = self._g, self._h
        return (
            v / (g * h) * math.log(g + h)
            - (v + h * s) / (h * (g + h)) * math.log(g)
            - (v - g * s) / (g * (g + h)) * math.log(h)
            + self._log_beta((self._r + v - g * s) / (g * (g + h)), (self._r + v + h * s) / (h * (g + h)))
            - self._normalizer
        )

    def bound(self, v: float, alpha: float) -> float:
        """The boundary, at most v / g, which the sum cannot exceed."""
        return _crossing(lambda s: self.log(s, v), v, alpha, most=v / self._g)

    def _log_beta(self, a: float, b: float) -> float:
        whole = float(special.betaln(a, b))
        if not self._one_sided:
            return whole
        return whole + math.log(float(special.betainc(a, b, self._h / (self._g + self._h))))


def poly_stitching(
    v: float, alpha: float, *, v_min: float, c: float = 0.0, s: float = 1.4, eta: float = 2.0
) -> float:
    """Closed-form boundary of the rate of the law of the iterated logarithm (Theorem 1 with
    h(k) = k^s zeta(s)), one-sided, for times from `v_min` on; `c` is the sub-gamma scale.
    """
    time = max(v, v_min)
    ell = (
        s * math.log(math.log(eta * time / v_min))
        + math.log(float(special.zeta(s)) / math.log(eta) ** s)
        + math.log(1 / alpha)
    )
    k1 = (eta**0.25 + eta**-0.25) / math.sqrt(2)
    linear = (math.sqrt(eta) + 1) / 2 * c * ell
    return math.sqrt(k1 * k1 * time * ell + linear * linear) + linear


def _crossing(
    log_martingale: Callable[[float], float], v: float, alpha: float, *, most: float | None = None
) -> float:
    """The s >= 0 at which the log martingale reaches ln(1 / alpha), or `most` where it never does."""
    threshold = math.log(1 / alpha)
    high = most if most is not None else max(v, 1e-12)
    if most is None:
        for _ in range(60):
            if log_martingale(high) > threshold:
                break
            high *= 2
    if log_martingale(high) <= threshold:
        return high
    return float(optimize.brentq(lambda s: log_martingale(s) - threshold, 0.0, high, xtol=1e-12, rtol=1e-13))
