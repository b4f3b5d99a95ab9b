"""Types of request fields whose rules or messages pydantic does not have."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from giantleap.models.pixels.image_formats import ImageFormat


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


class JsonRequest(BaseModel):
    """A JSON object of a client. Unknown fields are refused; null for an optional field is as if it were left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}


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
