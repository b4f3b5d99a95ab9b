"""Lengths on the command line of the pocket's training."""

import pytest
import typer
from typer.testing import CliRunner

from giantleap.training.optim import Budget
from giantleap.training.pocket.__main__ import app
from giantleap.training.pocket.options import to_budget


@pytest.mark.parametrize(("text", "budget"), [("30m", Budget(minutes=30.0)), ("5000", Budget(steps=5000))])
def test_a_length_is_minutes_or_steps(text: str, budget: Budget) -> None:
    assert to_budget(text) == budget and to_budget(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "m", "0", "-3m", "nanm", "infm", "1.5", "30s"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="30m"):
        to_budget(text)


def test_the_command_line_says_which_lengths_there_are() -> None:
    ended = CliRunner().invoke(app, ["autoencoder", "--length", "30s"])
    assert ended.exit_code == 2 and "30m" in ended.output
    assert "[default: 46m]" in CliRunner().invoke(app, ["autoencoder", "--help"], env={"COLUMNS": "160"}).output
