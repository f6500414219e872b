"""Parts of hand-written JSON Schemas; goes when the documents of the commands are dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keyreel.render.documents import Json, plain

__all__ = ["COUNT", "DRAFT", "FAILED", "SECONDS", "TEXT", "TEXT_OR_NULL", "Json", "list_of", "object_of", "plain"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def object_of(properties: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Json:
    """Schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def list_of(items: Mapping[str, Any], least: int = 0) -> Json:
    """Schema of an array."""
    return {"type": "array", "items": dict(items), "minItems": least}


TEXT: Json = {"type": "string"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
SECONDS: Json = {"type": "number", "minimum": 0}
COUNT: Json = {"type": "integer", "minimum": 0}
FAILED = list_of(object_of({"video": TEXT, "error": TEXT, "exit_code": {"type": "integer", "minimum": 1}}))
