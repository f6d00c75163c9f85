"""Numbers on the command line, of every command."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.cli_replay import replay
from core.finite import FiniteRange


def commands(group: click.Group) -> Iterator[click.Command]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        yield from commands(found) if isinstance(found, click.Group) else [found]


def test_every_range_of_numbers_is_of_finite_ones() -> None:
    ranges = [option.type for command in [*commands(cli), replay] for option in command.params]
    of_click = [one for one in ranges if isinstance(one, click.FloatRange)]
    assert len(of_click) > 30
    assert all(isinstance(one, FiniteRange) for one in of_click)


SIMULATE = ("simulate", "layout.yaml", "--trace", "trace.csv")
PLAN = ("plan", "--slo", "ttft=1,tpot=1", "--lengths", "prompt=5,output=5")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "arguments",
    [
        (*SIMULATE, "--rate"),
        (*SIMULATE, "--arrival", "gamma", "--cv"),
        (*PLAN, "--share"),
        (*PLAN, "--rate"),
        (*PLAN, "--burstiness"),
        ("plan", "replay", "trace.csv", "--profile", "p.json", "--slo", "ttft=1,tpot=1", "--workers", "2", "--rate"),
        ("serve", "--slo", "ttft=1,tpot=1", "--rate"),
    ],
)
def test_what_is_no_number_is_refused_by_the_flag(arguments: tuple[str, ...], value: str) -> None:
    result = CliRunner().invoke(cli, [*arguments, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[-1]}'" in result.output
    assert value in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*SIMULATE, "--arrival", "gamma", "--cv", "1e200"), "1e+200 is not in the range 0.01<=x<=100"),
        ((*PLAN, "--burstiness", "1e-300"), "1e-300 is not in the range 0.0001<=x<=10000"),
    ],
)
def test_a_variation_that_no_gaps_have_is_refused_with_the_range(arguments: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(cli, [*arguments])
    assert result.exit_code == 2
    assert told in result.output
