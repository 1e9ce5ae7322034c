"""Outputs that are wanted as their best classes, by the classification extension of the Open Inference
Protocol: of each row so many texts `value:index:name`, best first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
from headrace.v1.dataplane_pb2 import PredictReply
from headrace.v1.tensor_pb2 import Tensor

from services.common.errors import InvalidArgument
from services.gateway.codecs.places import Scalar
from services.gateway.codecs.results import Array, array_of
from services.gateway.codecs.tensors import pack_bytes
from services.gateway.datatypes import BOOL, BYTES
from services.gateway.signature import ModelSignature

#: Of one output: texts are made one by one, between the requests of others.
_MAX_TEXTS = 16_384


def wanted_classes(
    signature: ModelSignature, outputs: Iterable[tuple[str, Mapping[str, Scalar] | None]]
) -> dict[str, int] | None:
    """How many of their best classes the requested outputs, by name and parameters, are wanted as; None where
    all are wanted as they are. Raises InvalidArgument."""
    wanted: dict[str, int] = {}
    for name, parameters in outputs:
        count = (parameters or {}).get("classification")
        if not count:
            continue
        where = f"outputs.{name}"
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise InvalidArgument(f"{where}: classification must be a number of classes.", field=where)
        if any(spec.name == name and spec.datatype in (BOOL, BYTES) for spec in signature.outputs):
            raise InvalidArgument(f"{where} has no numbers to find the best classes by.", field=where)
        wanted[name] = count
    return wanted or None


def put_classes(reply: PredictReply, wanted: Mapping[str, int], signature: ModelSignature) -> None:
    """Have `reply`, of a version of `signature`, say the best classes of the outputs in `wanted` in place of
    their numbers. Raises InvalidArgument where that would be too many texts."""
    for tensor in reply.outputs:
        if tensor.name in wanted:
            _put(tensor, wanted[tensor.name], signature)


def _put(tensor: Tensor, count: int, signature: ModelSignature) -> None:
    scores = array_of(tensor)
    rows = scores.shape[:1] if signature.batched else ()
    width = prod(scores.shape[len(rows) :])
    count = min(count, width)
    if prod(rows) * count > _MAX_TEXTS:
        where = f"outputs.{tensor.name}"
        raise InvalidArgument(
            f"{where} would be {prod(rows) * count} texts, more than {_MAX_TEXTS}: ask for fewer classes.",
            field=where,
        )
    table = scores.reshape(prod(rows), width)
    # Other outputs of a classifier have other sizes.
    names = signature.classes if signature.is_classifier and len(signature.classes) == width else ()
    endings = [f":{index}:{name}" for index, name in enumerate(names)]
    texts = [
        (str(values[index]) + (endings[index] if endings else f":{index}")).encode()
        for values, best in zip(table, _best(table, count), strict=True)
        for index in best
    ]
    tensor.datatype = BYTES.number
    tensor.shape[:] = [*rows, count]
    tensor.data = pack_bytes(texts)


def _best(table: Array, count: int) -> list[list[int]]:
    """Where the largest `count` values of each row stand, largest first, equal ones in order, NaN last."""
    if table.dtype.kind == "f":
        table = np.where(np.isnan(table), -np.inf, table)
    # From behind, since what is sorted stands in the order that it had.
    backwards = np.argsort(table[:, ::-1], axis=1, kind="stable")[:, ::-1]
    best: list[list[int]] = (table.shape[1] - 1 - backwards[:, :count]).tolist()
    return best
