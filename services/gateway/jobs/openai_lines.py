"""Lines of an OpenAI batch file: what must hold of each, and of all of them together. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

MAX_LINES = 50_000
MAX_LINE_BYTES = 8 << 20
#: Findings listed on a batch; a file with more is not looked at further.
MAX_FINDINGS = 50
_MAX_CUSTOM_ID = 512
_SPACE = b" \t\r\n"

EMBEDDINGS = "/v1/embeddings"
PREDICT = "/v1/predict"
_PREDICT_MODEL = re.compile(r"/v1/models/([A-Za-z0-9._-]{1,128})/predict")
#: OpenAI's endpoints that generate text, which no model here does.
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Named(msgspec.Struct):
    model: Any = None
    version: Any = None


_lines = msgspec.json.Decoder(_Line)
_named = msgspec.json.Decoder(_Named)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with the file: with `line` (from 1), or with all of it. `code` is for programs."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As it stands in `errors.data` of a batch."""
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True)
class Line:
    """One request: `body` is the JSON that its route takes."""

    number: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What every line of the file asks for."""

    model: str
    version: str


def model_of_endpoint(endpoint: str) -> str | None:
    """The model that `endpoint` names, "" where its bodies do; None where it takes no batches."""
    if endpoint in (EMBEDDINGS, PREDICT):
        return ""
    named = _PREDICT_MODEL.fullmatch(endpoint)
    return named[1] if named else None


class LineReader:
    """Reads the lines of one file in their order, and remembers what must not differ or repeat."""

    def __init__(self, endpoint: str) -> None:
        """Raises ValueError for an endpoint that takes no batches."""
        model = model_of_endpoint(endpoint)
        if model is None:
            raise ValueError(f"{endpoint} takes no batches")
        self._endpoint = endpoint
        self._path_model = model
        self._first_line: dict[str, int] = {}
        self._asked: Wanted | None = None
        self.findings: list[Finding] = []
        self.count = 0

    def read(self, lines: Iterable[bytes]) -> Iterator[Line]:
        """The lines that are requests. Blank ones are skipped; what is wrong is added to `findings`, and
        after `MAX_FINDINGS` or `MAX_LINES` nothing more is read."""
        for number, raw in enumerate(lines, 1):
            text = raw.strip(_SPACE)
            if not text:
                continue
            self.count += 1
            if self.count > MAX_LINES:
                self.findings.append(Finding("too_many_tasks", f"The file has more than {MAX_LINES} lines."))
                return
            try:
                yield self._line(number, text)
            except _Wrong as wrong:
                self.findings.append(wrong.finding)
            if len(self.findings) >= MAX_FINDINGS:
                return
        if not self.count:
            self.findings.append(Finding("empty_file", "The file has no lines."))

    @property
    def wanted(self) -> Wanted:
        """What the lines read so far ask for. Raises ValueError before the first."""
        if self._asked is None:
            raise ValueError("no line was read")
        return self._asked

    def _line(self, number: int, text: bytes) -> Line:
        if len(text) > MAX_LINE_BYTES:
            raise _Wrong("line_too_long", f"The line is longer than {MAX_LINE_BYTES} bytes.", number)
        try:
            line = _lines.decode(text)
            named = _named.decode(line.body) if line.body else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = "The line is not a JSON object with an object body."
            raise _Wrong("invalid_json_line", message, number) from None
        if named is None:
            raise _Wrong("missing_required_parameter", "body is missing.", number, "body")
        custom_id = self._custom_id(number, line.custom_id)
        if line.method != "POST":
            raise _Wrong("invalid_method", "method must be POST.", number, "method")
        if line.url != self._endpoint:
            message = f"url must be the endpoint of the batch, {self._endpoint}."
            raise _Wrong("invalid_url", message, number, "url")
        self._agree(number, named)
        return Line(number, custom_id, bytes(line.body))

    def _custom_id(self, number: int, given: Any) -> str:
        if not isinstance(given, str) or not 0 < len(given) <= _MAX_CUSTOM_ID:
            message = f"custom_id must be a text of 1 to {_MAX_CUSTOM_ID} characters."
            raise _Wrong("missing_required_parameter", message, number, "custom_id")
        first = self._first_line.setdefault(given, number)
        if first != number:
            message = f"The custom_id {given[:64]!r} stands in line {first} already."
            raise _Wrong("duplicate_custom_id", message, number, "custom_id")
        return given

    def _agree(self, number: int, named: _Named) -> None:
        """The line must name a model, the same as those before it."""
        model = named.model or self._path_model
        if not isinstance(model, str) or not model:
            raise _Wrong("missing_required_parameter", "body.model is missing.", number, "body.model")
        if self._path_model and model != self._path_model:
            raise _Wrong("mismatched_model", f"The url names {self._path_model}.", number, "body.model")
        asked = Wanted(model, "" if named.version is None else str(named.version))
        if self._asked is None:
            self._asked = asked
        elif self._asked != asked:
            message = f"Every line must ask for the same model and version, {self._asked.model} as before."
            raise _Wrong("mismatched_model", message, number, "body.model")


class _Wrong(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, line: int, param: str | None = None) -> None:
        super().__init__(message)
        self.finding = Finding(code, message, line, param)
