"""Messages for values that a pydantic model refused, in the project's words and without the value."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

_WHOLE, _NUMBER, _TRUTH = "must be a whole number", "must be a number", "must be true or false"
_OBJECT, _LIST = "must be an object of named fields", "must be a list"
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "missing": "is required",
        "missing_argument": "is required",
        "missing_keyword_only_argument": "is required",
        "extra_forbidden": "is not a known field",
        "unexpected_keyword_argument": "is not a known field",
        "invalid_key": "has a name that is not text",
        "none_required": "must be null",
        "json_invalid": "is not valid JSON",
        "json_type": "must be JSON as text",
        "string_type": "must be text",
        "string_unicode": "must be text in UTF-8",
        "string_not_ascii": "must be ASCII text",
        "string_too_short": "is too short; the minimum is {min_length} characters",
        "string_too_long": "is too long; the maximum is {max_length} characters",
        "string_pattern_mismatch": "must match {pattern}",
        "int_type": _WHOLE,
        "int_parsing": _WHOLE,
        "int_from_float": _WHOLE,
        "int_parsing_size": "has too many digits",
        "float_type": _NUMBER,
        "float_parsing": _NUMBER,
        "finite_number": "must be a finite number",
        "bool_type": _TRUTH,
        "bool_parsing": _TRUTH,
        "greater_than": "must be above {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be below {lt}",
        "less_than_equal": "must be at most {le}",
        "multiple_of": "must be a multiple of {multiple_of}",
        "too_short": "is too short; the minimum length is {min_length}",
        "too_long": "is too long; the maximum length is {max_length}",
        "literal_error": "must be {expected}",
        "enum": "must be {expected}",
        "list_type": _LIST,
        "tuple_type": _LIST,
        "set_type": _LIST,
        "frozen_set_type": _LIST,
        "dict_type": _OBJECT,
        "frozen_dict_type": _OBJECT,
        "mapping_type": _OBJECT,
        "model_type": _OBJECT,
        "model_attributes_type": _OBJECT,
        "dataclass_type": _OBJECT,
        "union_tag_not_found": "lacks its field {discriminator}",
        "union_tag_invalid": "has an unknown {discriminator}; known are {expected_tags}",
        "bytes_type": "must be bytes",
        "path_type": "must be a path",
    }
)
_OTHER = "has a value that is not allowed"


def explain(fault: Mapping[str, Any]) -> str:
    """The reason of one entry of `ValidationError.errors()`.

    A validator of our own that raised an error has written the reason itself.
    """
    kind, context = str(fault["type"]), fault.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return REASONS.get(kind, _OTHER).format_map({name: _to_text(value) for name, value in context.items()})


def _to_text(value: object) -> str:
    """A limit without the decimals of a whole number."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
