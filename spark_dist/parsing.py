"""From a command line or a recipe to options."""

import json
import re
from argparse import Action
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from data_tools.errors import UserError, unknown_name

from .config import DistillOptions, TrainOptions
from .options import Options, flag, shown

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SWITCHES = {True: "on", False: "off"}
"""Words that YAML takes for true and false."""


def parse(options: type[Options], argv: Sequence[str], program: str) -> Any:
    """An `options` object from arguments and an optional recipe (`--config FILE`, YAML); arguments win.

    Raises `UserError` for anything that does not fit.
    """
    argv = [re.sub(r"^--[a-z][a-z0-9.-]*", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    argv, recipes = without_recipes(with_values(argv, {f"--{f.name}" for f in fields(options) if f.type is bool}))
    if len(recipes) > 1:
        raise UserError(f"--config is given more than once ({', '.join(recipes)}); put all options into one recipe")
    refuse_empty(argv, {f"--{f.name}" for f in fields(options) if kind(f.type).startswith("a path")})
    argv = with_lists(argv, {f"--{f.name}" for f in fields(options) if takes_several(f.type)})
    parser = option_parser(options, program)
    try:
        # jsonargparse takes a recipe's text for its path, and checks both alike.
        recipe = [f"--config={yaml.safe_dump(read_recipe(path, options))}" for path in recipes]
        parsed = parser.parse_args([*recipe, *argv])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{in_words(error, options)} (see {program} --help)") from None
    return options(**{field.name: getattr(parsed, field.name) for field in fields(options)})


def option_parser(options: type[Options], program: str) -> ArgumentParser:
    """The parser of a command line of `options`, with help in groups."""
    parser = DashedParser(
        prog=program,
        exit_on_error=False,
        allow_abbrev=False,
        description=options.__doc__,
        formatter_class=HelpFormatter,
        print_config=None,
    )
    positional = [field for field in fields(options) if "positional" in field.metadata]
    for field in positional:
        parser.add_argument(field.name, nargs=field.metadata.get("nargs"), help=field.metadata["positional"])
    parser.add_argument("--config", action="config", metavar="FILE", help="recipe: a YAML file of options")
    parser.add_class_arguments(options, as_group=False, skip={field.name for field in positional})
    # All are added in one go, as reading the docstrings takes its time, and then dealt out to their groups.
    actions = {action.dest: action for action in parser._actions}
    for title, names in groups(options).items():
        group = parser.add_argument_group(title)
        for name in names:
            parser._optionals._group_actions.remove(actions[name])
            group._group_actions.append(actions[name])
    needed = [f"{flag(a.dest)} {a.dest.upper()}" for a in parser._actions if a.required and a.option_strings]
    parser.usage = " ".join(["%(prog)s", *needed, "[options]", *(f"{field.name} …" for field in positional)])
    return parser


def groups(options: type[Options]) -> dict[str, list[str]]:
    """Names of options under the title of their group: the docstring of the base class that declares them. A command's
    own are in none."""
    found: dict[str, list[str]] = {}
    for base in options.__mro__[1:]:
        for field in fields(base) if is_dataclass(base) else ():
            if home(options, field) is base:
                found.setdefault(str(base.__doc__), []).append(field.name)
    return found


def home(options: type[Options], field: Field) -> type:
    """The first class that declared an option."""
    return next(base for base in reversed(options.__mro__) if field.name in vars(base).get("__annotations__", ()))


class DashedParser(ArgumentParser):
    """Shows options with dashes."""

    def format_help(self) -> str:
        return dashed(super().format_help())


class HelpFormatter(DefaultHelpFormatter):
    """Says what an option's default is, and nothing of Python's types."""

    def _get_help_string(self, action: Action) -> str:
        if not action.option_strings or action.dest in ("help", "config"):
            return action.help
        if action.required:
            return f"{action.help} (required)"
        if action.default in (None, "", {}):
            return action.help
        default = json.dumps(action.default, default=str).strip('"')
        return f"{action.help} (default: {default})"


def dashed(text: str) -> str:
    """A text in which options are spelled with dashes."""
    return re.sub(r"--[a-z]\w*", lambda match: flag(match[0][2:]), text)


def in_words(error: Exception, options: type[Options]) -> str:
    """jsonargparse's error in a line, without Python's names for things."""
    text = " ".join(str(error).split())
    flags = {field.name: shown(field) for field in fields(options)}
    if found := re.match(r'Parser key "(\w+)', text):
        value = re.search(r" value: (.*)", text)
        takes = f"it takes {kind(get_type_hints(options)[found[1]])}"
        return f"{flags[found[1]]} can't be {value[1][:80]}; {takes}" if value else f"{flags[found[1]]}: {takes}"
    if found := re.match(r"unrecognized arguments: (--[\w.-]+)", text):
        return str(unknown_name("option", dashed(found[1]), flags.values()))
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"{', '.join(flags[name] for name in found[1].split(', '))} must be given"
    return dashed(text)


def kind(hint: Any) -> str:
    """The type of an option in words."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if get_origin(hint) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(hint) is list:
        return f"{kind(parts[0])} or several"
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(kind, parts))}]"
    if get_origin(hint) is dict:
        return f"names with {kind(parts[1])} each"
    return words.get(hint) or " or ".join(map(kind, parts))


def with_values(argv: Sequence[str], switches: set[str]) -> list[str]:
    """Arguments in which a switch without a value has `true`."""
    found = []
    for position, argument in enumerate(argv):
        found.append(argument)
        if argument in switches and (position + 1 == len(argv) or argv[position + 1].startswith("--")):
            found.append("true")
    return found


def with_lists(argv: Sequence[str], lists: set[str]) -> list[str]:
    """Arguments in which the words behind an option that takes several are one list, as YAML has it."""
    found: list[str | tuple[str, list[str]]] = []
    values = None
    for word in argv:
        name, equals, first = word.partition("=")
        if name in lists:
            values = [first] if equals else []
            found.append((name, values))
        elif values is not None and not word.startswith("--"):
            values.append(word)
        else:
            values = None
            found.append(word)
    return [word if isinstance(word, str) else as_list(*word) for word in found]


def as_list(name: str, values: Sequence[str]) -> str:
    """An option with a list of values; one that is a list in brackets stays as it is."""
    if not values:
        return name
    given = values[0] if len(values) == 1 and values[0].startswith("[") else json.dumps(values, ensure_ascii=False)
    return f"{name}={given}"


def takes_several(hint: Any) -> bool:
    """Whether an option takes a list of values."""
    return list in (get_origin(hint), *map(get_origin, get_args(hint)))


def refuse_empty(argv: Sequence[str], paths: set[str]) -> None:
    """Raises `UserError` for a path that is empty, which would be the working directory."""
    for word, following in pairwise([*argv, None]):
        if (word in paths and following == "") or (word.endswith("=") and word[:-1] in paths):
            raise UserError(f"{dashed(word.rstrip('='))} is empty; is a variable not set?")


def without_recipes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without `--config FILE` and `--config=FILE`, and the files."""
    rest, recipes = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            recipes.append(next(words, ""))
        elif word.startswith("--config="):
            recipes.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return rest, recipes


def read_recipe(path: str, options: type[Options]) -> dict[str, Any]:
    """The recipe's settings that are among `options`. One without a value has its default.

    One recipe serves both train and distill, so each takes what it knows; a key that neither knows is an error.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: can't be read as a recipe ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a list of 'option: value' lines")
    own = {field.name: field for field in fields(options)}
    for key in recipe:
        if key not in recipe_keys() | own.keys():
            raise UserError(f"{path}: {unknown_name('option', str(key), recipe_keys() | own.keys())}")
    known = {key: value for key, value in recipe.items() if key in own and value not in (None, "")}
    for key, value in known.items():
        if isinstance(value, bool) and "off" in get_args(own[key].type):
            known[key] = SWITCHES[value]
        elif takes_several(own[key].type) and not isinstance(value, list):
            known[key] = [value]
    return known


def recipe_keys() -> set[str]:
    """The options of train and distill."""
    return {field.name for options in (TrainOptions, DistillOptions) for field in fields(options)}
