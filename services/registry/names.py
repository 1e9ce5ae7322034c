"""What models, versions, aliases and pools may be called."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Spelling:
    """A text that looks like `pattern`; who gets it wrong is told `rule`."""

    def __init__(self, pattern: str, rule: str) -> None:
        self._pattern = re.compile(pattern)
        self._rule = rule

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^{self._pattern.pattern}$"}

    def _checked(self, text: str) -> str:
        if not self._pattern.fullmatch(text):
            raise PydanticCustomError("spelling", "{text} is no name: {rule}", self._shown(text))
        return text

    def _shown(self, text: str) -> dict[str, Any]:
        return {"text": repr(text[:80]), "rule": self._rule}


ModelName = Annotated[
    str,
    Spelling(
        r"[a-z0-9][a-z0-9._-]{0,62}",
        "at most 63 lower-case letters, digits, '.', '_' and '-', the first a letter or a digit",
    ),
]
VersionText = Annotated[
    str,
    Spelling(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "at most 64 letters, digits, '.', '_' and '-', the first a letter or a digit",
    ),
]
#: Starts with a letter: the default version texts are whole numbers, and a request may name either.
AliasName = Annotated[
    str,
    Spelling(
        r"[A-Za-z][A-Za-z0-9._-]{0,62}",
        "at most 63 letters, digits, '.', '_' and '-', the first a letter",
    ),
]
PoolName = Annotated[
    str,
    Spelling(
        r"[a-z0-9][a-z0-9-]{0,31}",
        "at most 32 lower-case letters, digits and '-', the first a letter or a digit",
    ),
]
