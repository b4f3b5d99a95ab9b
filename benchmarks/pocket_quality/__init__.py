"""Measure the quality of the pocket bundle against its floors."""

from typing import Literal

Part = Literal["all", "pictures", "prompts"]
