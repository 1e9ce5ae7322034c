"""Batch jobs on the worker: chunks of rows in, results out.

Read in the order of a chunk: app.py (wiring), group.py and producer.py (the pool's consumer group behind
port.py; outages.py is what their client says of a broker that is away), consumer.py (a few chunks at a time),
work.py (one chunk from record to result), jobs.py (is it still wanted), deaths.py (does it kill), reading.py
(its rows by format: tables.py with arrow_sizes.py, columns.py, csv_rows.py, json_rows.py, json_values.py,
images.py; what they give: rows.py), running.py (through the version's slot, at the lowest class), results.py
(what the gateway streams), records.py (the prediction log). threads.py gives the threads of all this,
metrics.py counts."""
