"""Bodies of the Open Inference Protocol V2 with binary tensors, to and from numpy."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace_client.results import Inference

HEADER_LENGTH = "inference-header-content-length"

_NAMES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
_DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _NAMES.items()}


def encode_request(
    inputs: Mapping[str, ArrayLike], outputs: Sequence[str] = (), request_id: str | None = None
) -> tuple[bytes, int]:
    """The body and the length of its JSON part. Raises ValueError for an array of no known datatype."""
    described, raw = [], []
    for name, given in inputs.items():
        array = np.asarray(given)
        datatype, data = _raw(name, array)
        described.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": len(data)},
            }
        )
        raw.append(data)
    body: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True}}
    if request_id is not None:
        body["id"] = request_id
    if outputs:
        body["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps(body, separators=(",", ":")).encode()
    return b"".join([head, *raw]), len(head)


def decode_answer(content: bytes, json_length: int | None) -> Inference:
    """From a body whose first `json_length` bytes (all of it where None) are JSON."""
    size = len(content) if json_length is None else json_length
    body = json.loads(content[:size])
    outputs, position = {}, size
    for tensor in body["outputs"]:
        length = tensor.get("parameters", {}).get("binary_data_size")
        if length is None:
            outputs[tensor["name"]] = _from_json(tensor)
        else:
            outputs[tensor["name"]] = _from_raw(tensor, content[position : position + length])
            position += length
    return Inference(body["model_name"], body.get("model_version"), body.get("id", ""), outputs)


def _raw(name: str, array: NDArray[Any]) -> tuple[str, bytes]:
    if array.dtype.kind in "OSU":
        items = [_item(name, item) for item in array.ravel()]
        return "BYTES", b"".join(struct.pack("<I", len(item)) + item for item in items)
    datatype = _NAMES.get(array.dtype.name)
    if datatype is None:
        raise ValueError(f"{name}: there is no datatype for {array.dtype}")
    return datatype, np.ascontiguousarray(array, dtype=_DTYPES[datatype]).tobytes()


def _item(name: str, item: object) -> bytes:
    if isinstance(item, str):
        return item.encode()
    if not isinstance(item, bytes | bytearray | memoryview):  # bytes(3) would be three zeros
        raise ValueError(f"{name}: {item!r} is neither text nor bytes")  # noqa: TRY004 - as of other datatypes
    return bytes(item)


def _from_json(tensor: dict[str, Any]) -> NDArray[np.generic]:
    if tensor["datatype"] == "BYTES":
        flat = np.asarray(tensor["data"], dtype=object).ravel()
        items = [item.encode() if isinstance(item, str) else item for item in flat]
        return _objects(items, tensor["shape"])
    return np.asarray(tensor["data"], dtype=_DTYPES[tensor["datatype"]]).reshape(tensor["shape"])


def _from_raw(tensor: dict[str, Any], data: bytes) -> NDArray[np.generic]:
    if tensor["datatype"] != "BYTES":
        return np.frombuffer(data, dtype=_DTYPES[tensor["datatype"]]).reshape(tensor["shape"])
    items, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        items.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return _objects(items, tensor["shape"])


def _objects(items: list[bytes], shape: list[int]) -> NDArray[np.generic]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)
