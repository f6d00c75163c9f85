"""Command-line options made from the configuration tree, so that names, types and help exist once."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import click
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from cluster.config.tree import leaves

F = TypeVar("F", bound=Callable[..., Any])


def config_options(command: F) -> F:
    """Add one option per setting. An option that was not given is absent from the command's keyword arguments' values
    (None), so that the file and the defaults stand."""
    for _, _, name, info in reversed(list(leaves())):
        several = _is_mapping(info)
        command = click.option(
            _flag(name, info),
            name,
            type=_type(info),
            default=None,
            multiple=several,
            callback=_none_if_empty if several else None,
            metavar="NAME=PATH..." if several else None,
            help=_help(info),
        )(command)
    return command


class ListOptions(click.Command):
    """A command whose options of mappings take any number of name=value, or of objects in JSON, after one flag, as
    argparse has it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = {_flag(name, info) for _, _, name, info in leaves() if _is_mapping(info)}
        spread: list[str] = []
        flag = None
        for index, arg in enumerate(args):
            if arg.startswith("-"):
                flag = arg if arg in flags else None
            elif flag is not None and ("=" in arg or arg.startswith("{")) and args[index - 1] != flag:
                spread.append(flag)
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_mapping(info: FieldInfo) -> bool:
    return typing.get_origin(info.annotation) is dict


def _none_if_empty(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None


def _flag(name: str, info: FieldInfo) -> str:
    flag = "--" + name.replace("_", "-")
    return f"{flag}/--no-{flag[2:]}" if info.annotation is bool else flag


def _type(info: FieldInfo) -> Any:
    if any(isinstance(item, BeforeValidator) for item in info.metadata):
        return str  # it has a notation of its own
    kinds = [kind for kind in _members(info.annotation) if kind is not type(None)]
    kind = kinds[0]
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is dict:
        return str
    if typing.get_origin(kind) is Literal:
        values = typing.get_args(kind)
        return click.Choice([str(value) for value in values]) if isinstance(values[0], str) else int
    return None if kind is bool else kind


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else (annotation,)


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    return f"{text}." if info.default in (None, {}, ()) else f"{text}. [default: {info.default}]"
