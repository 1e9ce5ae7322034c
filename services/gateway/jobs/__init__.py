"""Jobs over many rows.

Read in this order: specs (what is asked for), tables, views, progress (what is told), sizing and splitting/
(cutting inputs), decisions (what happens next; pure), repository (what is stored), changes (one transaction
per decision), publishing, pauses, controller (acts), standing (what a topic tells of its chunks; pure),
losses (publishes what is gone once more), consumers (records from Kafka), results and formats (what comes
out), shares and downloads (how many read it at once), watching and events (progress), addresses and callbacks
(webhooks), retention, backend, service (what routes call; the routes are rest/batch.py), metrics, runtime
(all of it, in the background). Beside them, openai_*: the Batch API of OpenAI on top.

Other ways in, built on service: async_requests (single predictions answered later), openai_lines, openai_rows
(lines of a batch file to rows), openai_files, openai_tables, openai_batches (what callers see), openai_steps
(what becomes of a batch), openai_answers and openai_threads (results back to lines), openai_runtime.
"""
