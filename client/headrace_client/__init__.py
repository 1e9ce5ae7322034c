"""Headrace from Python: `Headrace` (sync) and `AsyncHeadrace`.

Read in this order: `client` or `async_client` (what can be asked), `operations` (each call as a request and
the reading of its answer), `exchange` (one request, its retries and errors), then `results`, `errors`,
`batches` with `batch_calls` and `async_batch_calls` (jobs over many rows, files, dead letters), `experiments`
with `experiment_calls` and `async_experiment_calls` (experiments and rollouts), `tensors` (Open Inference
Protocol bodies), `uploads` (multipart with progress), `cli`, `commands`, `model_cli`, `batch_cli`
and `experiment_cli`.
"""

from headrace_client.async_client import AsyncHeadrace
from headrace_client.batches import Batch, Pending, StoredFile
from headrace_client.client import Headrace
from headrace_client.errors import (
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from headrace_client.results import Embeddings, Inference, NewKey, Outcome, Prediction

__all__ = [
    "AsyncHeadrace",
    "Batch",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Embeddings",
    "Headrace",
    "HeadraceError",
    "Inference",
    "InvalidRequest",
    "NewKey",
    "NotFound",
    "Outcome",
    "Pending",
    "PermissionDenied",
    "Prediction",
    "RateLimited",
    "StoredFile",
    "Unauthenticated",
    "Unavailable",
]
