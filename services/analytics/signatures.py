"""What the served versions answer with, from the control topic."""

from __future__ import annotations

from headrace.v1.control_pb2 import ServingConfig
from headrace.v1.tensor_pb2 import Signature


class Signatures:
    """Follows control.deployments.v1. A version that is no longer served stays known: its records do too."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Signature]] = {}

    def apply(self, _key: bytes, value: bytes | None) -> None:
        """Take one record of the topic."""
        if value is None:
            return
        config = ServingConfig.FromString(value)
        versions = self._known.setdefault(config.model, {})
        for served in config.versions:
            versions[served.version] = served.signature

    def prediction_output(self, model: str, version: str) -> str:
        """Name of the output that holds the answer; empty: the first one."""
        signature = self._known.get(model, {}).get(version)
        return signature.prediction_output if signature is not None else ""

    def class_numbers(self, model: str) -> dict[str, float]:
        """Class names of the model's versions and the numbers that their predictions use for them."""
        names: dict[str, float] = {}
        for signature in self._known.get(model, {}).values():
            for number, name in enumerate(signature.classes):
                names.setdefault(name, float(number))
        return names
