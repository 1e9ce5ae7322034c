"""Analytics: what the predictions say about the versions that made them.

Read in this order: `app.py` (wiring), `consumers.py` (records come in), `columns.py`, `packed.py`,
`payload.py` and `arrays.py` (records as columns), `chunks.py` and `repository.py` (inbox, segments,
outcomes), `flushing.py`, `segments.py` and `joining.py` (inbox to Parquet, and what is kept how long),
`reading.py` and `queries.py` (one row per request, asked by DuckDB), `arm_queries.py`, `comparison.py` and
`statistics/` (two versions), `shadows.py`, `shadow_totals.py`, `shadow_units.py` and `shadow_report.py` (a
version and its shadow), `endpoints.py` and `schemas.py` (who asks). `tables.py` (PostgreSQL), `signatures.py`
(what versions take), `settings.py`, `metrics.py`.

Experiments and rollouts, decided: `trials.py` (what there is to judge), `looking.py` and `pace.py` (who is
looked at when), `late_firsts.py` (what came too late), `trial_strata.py`, `trial_queries.py` and
`trial_values.py` (what the units did), `evidence.py`, `pieces.py`, `quantile_evidence.py`,
`shadow_evidence.py`, `bandit.py` (what that proves), `verdicts.py` and `trial_words.py` (findings and their
words), `trial_store.py` and `lease.py` (what outlives a look, and which replica looks). Halves of one control
beside them: `placebo_looking.py`, `placebo_queries.py`, `placebo.py`, `placebo_store.py`,
`placebo_endpoints.py`.

Experiments and rollouts, for people: `experiment_endpoints.py` and `experiment_schemas.py` (who asks),
`results.py`, `arm_results.py`, `lifts.py`, `quantile_lifts.py`, `novelty.py` and `caveats.py` (every number
beside the verdict), `words.py` (one paragraph), `planning.py` (how many units it takes), `off_policy.py`
(what another policy would have earned).

Every request counts once. A record is claimed by its batch id, so a redelivered one changes nothing. A
request that was tried again or hedged has several rows; the answer its caller got is the router's, which
writes only what it answered itself, else a success, else the one with the highest attempt. That is a total
order, so the winner is the same whatever came first, and it is chosen when reading: nothing is ever
subtracted.
"""
