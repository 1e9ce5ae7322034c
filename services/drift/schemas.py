"""Bodies of the REST API that are not plain dictionaries of `recording.py`."""

from __future__ import annotations

import math
from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import (
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from services.drift.observations import Observations

#: A larger sample says nothing more about a distribution, and has to fit one request.
MAX_SAMPLE_ROWS = 1_000_000
#: Such a sample of a dozen features.
MAX_BODY_BYTES = 256 << 20

#: What PostgreSQL and JSON can hold: no zeros, no halves of a pair of surrogates.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]


class Strict(BaseModel):
    """A body whose unknown fields are errors: a misspelt one must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class ReferenceBody(Strict):
    """A sample of what the model was trained on: columns of numbers or of strings, all equally long. Use the
    names that `GET …/reference` and the windows show; answers are `prediction`."""

    features: Annotated[dict[Text, list[float] | list[Text]], Field(min_length=1)]

    @model_validator(mode="after")
    def _columns_fit(self) -> ReferenceBody:
        rows = {name: len(values) for name, values in self.features.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"columns differ in length: {rows}")
        if not 2 <= max(rows.values()) <= MAX_SAMPLE_ROWS:
            raise ValueError(f"a sample has 2 to {MAX_SAMPLE_ROWS} rows")
        for name, values in self.features.items():
            if any(isinstance(value, float) and not math.isfinite(value) for value in values):
                raise ValueError(f"{name} holds a number that is not finite")
        return self

    def observations(self) -> Observations:
        """The sample as the stream would have shown it."""
        numeric: dict[str, Any] = {}
        categorical: dict[str, list[str]] = {}
        for name, values in self.features.items():
            if isinstance(values[0], str):
                categorical[name] = [str(value) for value in values]
            else:
                numeric[name] = values
        return Observations(len(next(iter(self.features.values()))), numeric, categorical)


class WebhookBody(Strict):
    """Where alerts of `model` (of every model where it is absent) are to be posted."""

    url: AnyHttpUrl
    model: Annotated[Text | None, Field(max_length=63)] = None

    @field_validator("url")
    @classmethod
    def _no_metadata_service(cls, url: AnyHttpUrl) -> AnyHttpUrl:
        """Addresses that only machines use to talk to themselves or their cloud are nobody's webhook."""
        try:
            address = ip_address((url.host or "").strip("[]"))
        except ValueError:
            return url
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            raise ValueError("link-local, multicast and unspecified addresses are not taken")
        return url
