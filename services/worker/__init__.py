"""The worker: loads model versions and answers predictions in batches.

Read in the order of a request: app.py (wiring; guest.py, in a router's process), servicer.py (frames in and
out), grpc_server.py (one request at a time), input_layout.py (checks), shared_inputs.py, mapped_objects.py
and bus_errors.py (data that lies elsewhere), loaded_model.py and serving.py (a version that serves, and what
with), handed.py (its runs in threads), item.py, batcher.py and batch_queue.py (when and what runs together),
turn.py (work that is no request), priorities.py (who goes first, who is refused), run_time.py (how long runs
take), execution.py (joining, running, cutting, isolating), backends/ (what runs), padding.py, tensors.py,
outcome.py (who is answered what), prediction_log.py and record_columns.py (what is logged), replies.py and
wire.py (the bytes of it).

What is loaded: desired.py (deployments of the pool), model_host.py and slot.py (keeping up with them),
eviction.py (who makes room), parked.py (requests for who did), loading.py, load_mark.py, steadiness.py,
artifacts.py, warm_up.py, best_batch.py. Chunks of batch jobs: batch/. What others see: status.py,
heartbeat.py, stats.py, metrics.py. Start: settings.py, __main__.py."""
