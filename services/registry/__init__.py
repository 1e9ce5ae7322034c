"""The registry: models and their immutable versions, what is deployed, who may call. It tells the others
through `control.*`.

Read in this order: app.py (wiring), endpoints.py and serving_endpoints.py (REST), servicer.py and
grpc_server.py (gRPC), edge.py (transactions), service.py, deployments.py and keys.py (the rules),
repository.py and tables.py (PostgreSQL), publishing.py (control topics), alerts.py (what drift
found). uploads.py and artifacts.py bring
files into the store; schemas.py is what callers send, views.py what they get; metrics.py, http_metrics.py
and readiness.py tell how it is doing. Pure: buckets.py (who moves when weights change), signatures.py,
onnx_file.py and onnx_skeleton.py (what a file says of itself).
"""
