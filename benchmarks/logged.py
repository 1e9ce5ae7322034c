"""Records of the prediction log as workers write them, for the measurements of those who read it."""

from __future__ import annotations

import time

import numpy as np
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, Task, Tensor, TensorSpec

from services.common.ids import new_id

MODEL = "cancer"
VERSIONS = ("1", "2")
FEATURES = 30
SIGNATURE = Signature(
    inputs=[
        TensorSpec(
            name="x",
            datatype=DataType.DATA_TYPE_FP32,
            shape=[-1, FEATURES],
            columns=[f"f{number}" for number in range(FEATURES)],
        )
    ],
    outputs=[TensorSpec(name="y", datatype=DataType.DATA_TYPE_INT64, shape=[-1])],
    batched=True,
    task=Task.TASK_CLASSIFICATION,
    prediction_output="y",
)


def deployment() -> ServingConfig:
    """Both versions, 90/10."""
    served = [ServedVersion(version=version, signature=SIGNATURE) for version in VERSIONS]
    return ServingConfig(model=MODEL, revision=1, versions=served)


def record(
    rng: np.random.Generator,
    requests: int,
    *,
    at_us: int | None = None,
    origin: Origin = Origin.ORIGIN_ONLINE,
) -> PredictionBatch:
    """One executed batch of so many requests of one row each: 30 float32 features and an int64 answer."""
    x = rng.normal(size=(requests, FEATURES)).astype("<f4")
    y = rng.integers(0, 2, requests).astype("<i8")
    version = VERSIONS[int(rng.random() < 0.1)]
    return PredictionBatch(
        batch_id=new_id(),
        source="worker-1",
        writer=PredictionBatch.WRITER_WORKER,
        model=MODEL,
        version=version,
        artifact_digest="sha256:" + "ab" * 32,
        answered_at_us=time.time_ns() // 1000 if at_us is None else at_us,
        request_ids=b"".join(new_id() for _ in range(requests)),
        unit_hashes=rng.integers(0, 50_000, requests).tolist(),
        variants=[0] * requests,
        variant_names=[version],
        propensities=[0.1 if version == "2" else 0.9] * requests,
        revisions=[1] * requests,
        codes=[Code.CODE_OK] * requests,
        origins=[origin] * requests,
        attempts=[0] * requests,
        cached=[False] * requests,
        latency_us=rng.integers(500, 5_000, requests).tolist(),
        queue_us=[100] * requests,
        compute_us=[50] * requests,
        rows=[1] * requests,
        inputs=[Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=x.shape, data=x.tobytes())],
        outputs=[Tensor(name="y", datatype=DataType.DATA_TYPE_INT64, shape=y.shape, data=y.tobytes())],
    )
