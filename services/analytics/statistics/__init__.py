"""Statistics of experiments: pure functions over sufficient statistics, no I/O.

Reading order: `moments` (what is accumulated), `effects` (two arms to one effect: means, proportions, ratios,
quantiles, CUPED), then what is said about an effect: `fixed_horizon`, `sequential` (valid at every look),
`bayesian`. Beside them `proportions`, `means`, `counts` (chi-square, sample ratio), `boundaries`, `bounded`
and `quantiles` (confidence sequences), `group_sequential`, `multiple`, `power`, `policies` (off-policy
estimates, bandit weights), `simulation` (A/A). What decides by itself: `bets` (exact, about shares and
quantiles) and `stratified` (one effect over changing weights, clustered by unit).

The estimate is always treatment minus control. `alpha` is the two-sided error rate.
"""
