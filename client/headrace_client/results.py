"""What calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer of a model. `prediction` has one entry per row (the entry itself for a single `input`);
    `variant`, `confidence` and `experiment` (the one that assigned the variant) are None where there is
    none."""

    request_id: str
    model: str
    version: str
    prediction: Any
    outputs: Json
    cached: bool
    latency_ms: float
    variant: str | None = None
    confidence: Any = None
    experiment: str | None = None

    @classmethod
    def read(cls, body: Json) -> Prediction:
        """From the JSON of `/v1/predict`."""
        return cls(
            request_id=body["request_id"],
            model=body["model"],
            version=body["version"],
            prediction=body["prediction"],
            outputs=body["outputs"],
            cached=body["cached"],
            latency_ms=body["latency_ms"],
            variant=body.get("variant"),
            confidence=body.get("confidence"),
            experiment=body.get("experiment"),
        )


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector per text."""

    embeddings: list[list[float]]
    dimensions: int
    model: str
    version: str
    request_id: str

    @classmethod
    def read(cls, body: Json) -> Embeddings:
        """From the JSON of `/v1/embed`."""
        return cls(
            embeddings=body["embeddings"],
            dimensions=body["dimensions"],
            model=body["model"],
            version=body["version"],
            request_id=body["request_id"],
        )


@dataclass(frozen=True, slots=True)
class Inference:
    """An answer of the Open Inference Protocol: arrays by output name; BYTES come as arrays of `bytes`."""

    model: str
    version: str | None
    request_id: str
    outputs: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a prediction: its true `label`, or the `value` of a `metric`. The same `event_id` counts
    once; `row` is the row of the request, from 0."""

    request_id: str
    label: bool | float | str | None = None
    metric: str | None = None
    value: bool | float | str | None = None
    row: int = 0
    event_id: str | None = None
    model: str | None = None

    def body(self) -> Json:
        """As the gateway reads it."""
        names = ("label", "metric", "value", "event_id", "model")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"request_id": self.request_id, **given, **({"row": self.row} if self.row else {})}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new API key. `key` is shown this once."""

    key: str
    key_id: str
    name: str
    scopes: tuple[str, ...]

    @classmethod
    def read(cls, body: Json) -> NewKey:
        """From the JSON of `/v1/keys`."""
        return cls(body["key"], body["key_id"], body["name"], tuple(body["scopes"]))
