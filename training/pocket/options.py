"""Options that several commands of `training/pocket/__main__.py` share."""

import re
from typing import Annotated

import typer

from giantleap.training.optim import Budget


def to_budget(text: str | Budget) -> Budget:
    """The budget that a command line gives: `30m` are minutes, `5000` are steps.

    Raises:
        typer.BadParameter: The text is neither.
    """
    if isinstance(text, Budget):  # a default
        return text
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)m", text):
        return Budget(minutes=float(match[1]))
    if re.fullmatch(r"[1-9]\d*", text):
        return Budget(steps=int(text))
    raise typer.BadParameter(f"{text!r} is no length; give minutes, such as 30m, or a number of steps, such as 5000")


Length = Annotated[
    Budget, typer.Option(parser=to_budget, help="Time, such as 30m, or a number of steps, which repeats to the bit.")
]
Seed = Annotated[int, typer.Option(help="Fixes pictures, crops and weights.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from out/state.pt.")]
