"""What `lasp train` is told to run: a recipe of lasp's or of one's own, a file, or both, and what options change in it.

lasp train quickstart --steps 20                     a recipe by its name
lasp train my_module:recipe --steps 20               a function of no arguments that returns a configuration
lasp train --config run.yaml --steps 20              all fields from a file; with a recipe, those that differ
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro
import yaml

from lasp.config import ModelConfig, TrainConfig, from_dict, require
from lasp.own import load_own
from lasp.training import checkpoint

Recipes = Mapping[str, Callable[[], Any]]


def choose(command: str, words: list[str], recipes: Recipes) -> Any:
    """The configuration that the words after `lasp COMMAND` say.

    With initial_weights the model is theirs, unless options say otherwise. Raises ValueError for a recipe or a file
    that is none; leaves the process, as tyro does, where options are wrong or help is asked for.
    """
    words = list(words)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    file = _take_option(words, "--config")
    if name is None and file is None:
        _explain(command, recipes, asked=words[:1] in (["--help"], ["-h"]))
    default = None if name is None else _recipe(name, recipes)
    if file is not None:
        require(default is None or isinstance(default, TrainConfig), "config", file, "none with a sweep or a table")
        default = _with_file(default, file)

    def read(default: Any) -> Any:
        kind: Any = type(default)
        prog = f"lasp {command} {name or file}"
        return tyro.cli(kind, default=default, args=words, prog=prog, description=kind.__doc__)

    config = read(default)
    weights = getattr(config, "initial_weights", None)
    if isinstance(default, TrainConfig) and weights is not None and weights != default.initial_weights:
        model = from_dict(ModelConfig, checkpoint.read_config(weights)["model"])
        config = read(replace(default, model=model))
    return config


def as_yaml(config: Any) -> str:
    """What `--config` reads."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _recipe(name: str, recipes: Recipes) -> Any:
    known = recipes.get(name.replace("-", "_"))
    if known is None and ":" not in name:
        print(f"lasp: recipe: got {name!r}, expected one of those that lasp train --help lists", file=sys.stderr)
        sys.exit(2)
    config = (known or load_own("recipe", name))()
    kinds = {type(recipe()) for recipe in recipes.values()}
    require(type(config) in kinds, "recipe", f"{type(config).__name__} of {name}", "a TrainConfig")
    return config


class _Loader(yaml.SafeLoader):
    """YAML, in which 3e-4 is a number, too."""


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, [*"-+0123456789"])


def _with_file(default: TrainConfig | None, file: str) -> TrainConfig:
    """The configuration with what the file says; without one, the file says all."""
    try:
        told = yaml.load(Path(file).read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: got {file} ({error}), expected YAML") from error
    require(isinstance(told, dict), "config", file, "a file of fields and their values")
    try:
        return from_dict(TrainConfig, _merged({} if default is None else asdict(default), told))
    except ValueError as error:
        raise ValueError(f"config {file}: {error}") from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
        for name, value in above.items()
    }
    return below | both


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _take_option(words: list[str], option: str) -> str | None:
    """The option's value, which it takes out of the words."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            require(bool(equals) or place + 1 < len(words), option, "nothing", "the path of a file after it")
            value = value if equals else words.pop(place + 1)
            del words[place]
            return value
    return None


def _explain(command: str, recipes: Recipes, *, asked: bool) -> None:
    """Says what there is to choose, and leaves."""
    lines = [f"usage: lasp {command} RECIPE | MODULE:FUNCTION | --config FILE  [--FIELD VALUE …]", "", "recipes:"]
    for name, recipe in recipes.items():
        lines.append(f"  {name.replace('_', '-'):34}{(recipe.__doc__ or '').strip()}")
    lines += ["", f"lasp {command} RECIPE --help shows the fields."]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)
