"""Drift: whether the data still look like the reference.

Read in this order: `app.py` (wiring), `consumers.py` (records come in), `reading.py` and `observations.py`
(rows of records and their columns), `draw.py` (which of them are looked at), `sample.py` and `stream.py`
(reference, panes, windows), `evaluation.py` and `detectors/` (what a window says), `alerting.py` (what
persists), `recording.py`, `repository.py` and `tables.py` (what is kept), `webhooks.py` (who is told),
`endpoints.py` and `schemas.py` (who asks). `signatures.py` knows what versions take; `settings.py`,
`metrics.py`.
"""
