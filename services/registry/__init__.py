"""The registry: models and their immutable versions, what is deployed, what is tried out on it, who may
call. It tells the others through `control.*`.

Read in this order: app.py (wiring), endpoints.py, serving_endpoints.py, experiment_endpoints.py and
rollout_endpoints.py (REST), servicer.py and grpc_server.py (gRPC), edge.py (transactions), service.py,
deployments.py, serving_config.py and keys.py (the rules), repository.py, trial_queries.py, rollout_queries.py
and tables.py (PostgreSQL), publishing.py (control topics), alerts.py (what drift found). uploads.py and
artifacts.py bring files into the store; schemas.py and names.py are what callers send, views.py what they
get; settings.py, metrics.py, http_metrics.py and readiness.py tell how it is doing; bodies.py bounds what is
read. Pure: buckets.py (who moves when weights change), signatures.py, onnx_file.py and onnx_skeleton.py (what
a file says of itself).

Trials: controller.py (the loop that lets them act), verdicts.py (what analytics says), trials.py (what it is
asked), trial_schemas.py (metrics), workers.py (what is loaded), counting.py (how often they are
counted), retention.py (what is forgotten). Experiments: experiments.py (the rules),
experiment_running.py (what is served of them), experiment_control.py (what they do by themselves),
assignments.py and explanation.py (who gets which variant, and why), experiment_schemas.py and
experiment_views.py (what callers send and get); pure: experiment_steps.py (what to do
next), experiment_state.py (rows as routers and decisions see them), layers.py (who owns which buckets).
Rollouts: rollouts.py, rollout_control.py, rollout_schemas.py, rollout_views.py; pure: rollout_steps.py,
rollout_state.py, rollout_config.py, rollout_plan.py, rollout_guard.py, rollout_words.py."""
