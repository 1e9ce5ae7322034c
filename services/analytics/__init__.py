"""Analytics: what the predictions say about the versions that made them.

Read in this order: `app.py` (wiring), `consumers.py` (records come in), `columns.py` and `payload.py`
(records as columns), `repository.py` (inbox, segments, outcomes), `flushing.py` and `segments.py` (inbox to
Parquet), `reading.py` and `queries.py` (one row per request, asked by DuckDB), `comparison.py` and
`statistics/` (two versions), `endpoints.py` (who asks).

Every request counts once. A record is claimed by its batch id, so a redelivered one changes nothing. A
request that was tried again has several rows; the answer its caller got is the one with the highest attempt,
at equal attempts the router's, which is nearer to the caller. That is a total order, so the winner is the
same whatever came first, and it is chosen when reading: nothing is ever subtracted.
"""
