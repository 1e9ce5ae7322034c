"""Drift detectors: pure functions over arrays, counts and sketches; no I/O, no state between calls.

Reading order: `binning` (how values become counts), `psi` and `ks` (the defaults), `distances`
(Jensen-Shannon, Hellinger, Kullback-Leibler, Wasserstein), `categorical`, `features` (many features at
once), `multivariate`, `performance` (without labels), `online` (one value at a time), `sketches`.
"""
