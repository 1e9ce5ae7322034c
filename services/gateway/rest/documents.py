"""OpenAPI of the hot routes, whose bodies no framework parses."""

from __future__ import annotations

from typing import Any

_ROWS = {"description": "Rows, named columns, row objects, named tensors or a list of tensors.", "oneOf": [
    {"type": "array", "items": {}, "title": "rows, row objects or tensors"},
    {"type": "object", "title": "named columns or tensors"},
]}  # fmt: skip

#: Ids, and what versions are called.
_TEXT_OR_NUMBER = {"type": ["string", "integer"]}

_PREDICT_PROPERTIES: dict[str, Any] = {
    "inputs": _ROWS,
    "input": {"description": "A single row; the answer then holds a single prediction."},
    "user_id": _TEXT_OR_NUMBER | {"description": "Unit that experiments assign; sticky."},
    "session_id": _TEXT_OR_NUMBER | {"description": "Unit of experiments that assign sessions."},
    "attributes": {
        "type": "object",
        "description": "What experiments may target.",
        "maxProperties": 32,
        "additionalProperties": {
            "oneOf": [{"type": "string", "maxLength": 256}, {"type": "number"}, {"type": "boolean"}]
        },
    },
    "version": _TEXT_OR_NUMBER
    | {"description": "A version or an alias; without it the traffic split decides."},
    "outputs": {
        "type": "array",
        "items": {"type": "string"},
        "description": "Outputs wanted; without it all.",
    },
    "priority": {"enum": ["high", "normal", "low"]},
}
_MODEL = {"model": {"type": "string"}}

_PREDICTION: dict[str, Any] = {
    "type": "object",
    "required": ["request_id", "model", "version", "prediction", "outputs", "cached", "latency_ms"],
    "properties": {
        "request_id": {"type": "string"},
        "model": {"type": "string"},
        "version": {"type": "string"},
        "variant": {"type": "string"},
        "experiment": {"type": "string", "description": "The one that assigned the variant."},
        "prediction": {"description": "One entry per row; class names where the model has them."},
        "outputs": {"type": "object", "additionalProperties": {}},
        "confidence": {"description": "Classifiers: largest class probability per row."},
        "cached": {"type": "boolean"},
        "fallback": {"type": "boolean"},
        "latency_ms": {"type": "number"},
    },
}
PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "field": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "description": "Each field that is wrong, ten at most.",
            "items": {
                "type": "object",
                "properties": {"field": {"type": "string"}, "detail": {"type": "string"}},
            },
        },
    },
}
_V2_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_V2_TENSOR: dict[str, Any] = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}

_REASONS = {
    400: "The body cannot be parsed.",
    401: "No valid API key.",
    403: "The key lacks the scope or the model.",
    404: "No such model or version in service.",
    413: "The body is too large.",
    422: "The inputs do not fit the model's signature; `field` names where.",
    429: "The key's rate limit is used up, or the queue is full.",
    503: "Nobody can answer now.",
    504: "The deadline passed.",
}


def _json(schema: dict[str, Any], description: str, kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _body(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _route(summary: str, extra: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    problems = {
        status: _json(PROBLEM, reason, "application/problem+json") for status, reason in _REASONS.items()
    }
    return {
        "summary": summary,
        "openapi_extra": extra,
        "responses": {200: _json(answer, "The answer.")} | problems,
    }


PREDICT = _route("Predict", _body(_MODEL | _PREDICT_PROPERTIES, ["model"]), _PREDICTION)
PREDICT_MODEL = _route("Predict with one model", _body(_MODEL | _PREDICT_PROPERTIES, []), _PREDICTION)
EMBED = _route(
    "Turn texts into vectors",
    _body(
        _MODEL
        | {
            "inputs": {"type": "array", "items": {"type": "string"}},
            "user_id": _PREDICT_PROPERTIES["user_id"],
            "session_id": _PREDICT_PROPERTIES["session_id"],
            "attributes": _PREDICT_PROPERTIES["attributes"],
            "version": _PREDICT_PROPERTIES["version"],
            "priority": _PREDICT_PROPERTIES["priority"],
        },
        ["model", "inputs"],
    ),
    {
        "type": "object",
        "required": ["request_id", "model", "version", "embeddings", "dimensions"],
        "properties": {
            "request_id": {"type": "string"},
            "model": {"type": "string"},
            "version": {"type": "string"},
            "embeddings": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            "dimensions": {"type": "integer"},
            "cached": {"type": "boolean"},
            "latency_ms": {"type": "number"},
        },
    },
)

_V2_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": _V2_TENSOR},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
}
_V2_ANSWER = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "outputs": {"type": "array", "items": _V2_TENSOR},
    },
}
V2_INFER: dict[str, Any] = {
    "summary": "Infer (Open Inference Protocol V2, JSON or binary tensors)",
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _V2_REQUEST},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
    "responses": {200: _json(_V2_ANSWER, "The answer.")}
    | {status: _json(_V2_ERROR, reason) for status, reason in _REASONS.items() if status != 422},
}

_OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")
            },
        }
    },
}
OPENAI_EMBEDDINGS: dict[str, Any] = {
    "summary": "Turn texts into vectors (OpenAI)",
    "openapi_extra": _body(
        _MODEL
        | {
            "input": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": {"type": "integer"},
            "user": {"type": "string"},
        },
        ["model", "input"],
    ),
    "responses": {
        200: _json(
            {
                "type": "object",
                "required": ["object", "data", "model", "usage"],
                "properties": {
                    "object": {"const": "list"},
                    "data": {"type": "array", "items": {"type": "object"}},
                    "model": {"type": "string"},
                    "usage": {"type": ["object", "null"]},
                },
            },
            "The answer.",
        )
    }
    | {status: _json(_OPENAI_ERROR, reason) for status, reason in _REASONS.items() if status != 422},
}
