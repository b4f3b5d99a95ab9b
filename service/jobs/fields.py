"""Types of request fields whose rules or messages pydantic does not have."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue

from giantleap.models.image_formats import ImageFormat


def to_whole(value: object) -> object:
    """256.0 as 256: a JSON Schema integer is any number without a fraction (2020-12, section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_format_name(value: object) -> object:
    """`jpg`, which users write for `jpeg`, as the one name that the service uses."""
    return "jpeg" if value == "jpg" else value


Text = Annotated[str, Field(min_length=0)]
"""Text in UTF-8: the limit makes pydantic refuse the halves of surrogate pairs that JSON may hold."""
Integer = Annotated[int, BeforeValidator(to_whole)]
FormatName = Annotated[ImageFormat, BeforeValidator(to_format_name)]


@dataclass(frozen=True, slots=True)
class Pattern:
    """The regular expression of a text field, and the reason where a text does not match."""

    regex: str
    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return AfterValidator(self._check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"pattern": self.regex}

    def _check(self, text: str) -> str:
        # `$` of Python also matches before a last newline.
        match = re.search(self.regex.removesuffix("$") + r"\Z" if self.regex.endswith("$") else self.regex, text)
        if match is None:
            raise ValueError(self.reason)
        return text
