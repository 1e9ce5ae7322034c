"""The port behind which models run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from headrace.v1.tensor_pb2 import DataType, Signature

from services.common.errors import FailedPrecondition
from services.worker.tensors import Array, Buffer


class LoadFailed(FailedPrecondition):
    """The artifact cannot be served; the message says why and what would help."""


class LeftToOthers(LoadFailed):
    """It could be served, but not by this worker; nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the worker decides for its backends. `threads` is per running batch."""

    threads: int = 1


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows of different lengths run together. Dimensions are those of one row.

    `inputs`: per input of open length which dimension that is, and the element it is filled up with.
    `outputs`: per output the dimensions that are as long as the inputs, and are cut back."""

    inputs: Mapping[str, tuple[int, bytes]]
    outputs: Mapping[str, tuple[int, ...]]


class Backend(Protocol):
    """One loaded model version. `run` is called from one thread at a time per slot of the batcher, and from
    several threads at once where the version has several slots, or runs on a processor: there batch jobs
    run beside the slots."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda:0", …"""
        ...

    @property
    def padding(self) -> Padding | None:
        """How rows of different lengths may run together; None: they may not."""
        ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The named outputs (all where none is named) for `inputs`, which match the signature; BYTES tensors
        are object arrays of `bytes`. Row i of a batched output answers row i of the inputs. The arrays are
        the caller's: the next run writes into others.

        Raises InvalidArgument where the input's values are at fault; anything else is the model's failure."""
        ...

    def close(self) -> None:
        """Give memory back. Nothing runs any more."""
        ...


@runtime_checkable
class KeptBuffers(Protocol):
    """A backend that can keep buffers for batches of one number of rows, which spares small ones the making
    of arrays. Called as `run` is."""

    def run_kept(self, data: Sequence[Buffer], rows: int) -> list[tuple[bytes, tuple[int, ...]]] | None:
        """All outputs in the signature's order, bytes and shape of one row, for the joined bytes of the
        inputs in theirs; None where it has to be `run`, which then says what is wrong, too."""
        ...


#: Output that a backend gives when it is asked for, and not otherwise: tokens of each row, as it cut them.
TOKENS = "headrace.tokens"
#: Outputs beyond the signature's, by the backend's name.
EXTRA_OUTPUTS: Mapping[str, Mapping[str, DataType]] = {"embedding": {TOKENS: DataType.DATA_TYPE_INT64}}


#: Loads the files below a directory, checked against the signature. Blocking: called in a thread.
#: Raises LoadFailed.
Load = Callable[[Path, Signature, BackendOptions], Backend]
