"""What the fields of a configuration may hold, said in their annotations and checked in one place."""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def require(condition: bool, field: str, got: object, expected: str) -> None:
    """Raises ValueError that names the field, what was got and what was expected."""
    if not condition:
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class Allowed:
    """Which values of its type a field may hold: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


MOST = 2**31 - 1  # of whatever is counted
Count = Annotated[int, Allowed("at least 1, an integer below 2^31", lambda n: 1 <= n <= MOST)]
CountOrZero = Annotated[int, Allowed("at least 0, an integer below 2^31", lambda n: 0 <= n <= MOST)]
Seed = Annotated[int, Allowed("at least 0, an integer below 2^64", lambda n: 0 <= n < 2**64)]
Positive = Annotated[float, Allowed("a positive number", lambda x: 0 < x < math.inf)]
PositiveOrInf = Annotated[float, Allowed("a positive number (inf: no limit)", lambda x: x > 0)]
NotNegative = Annotated[float, Allowed("a number of at least 0", lambda x: 0 <= x < math.inf)]
Seconds = Annotated[float, Allowed("a positive number of seconds, 0.001 to 1e8", lambda x: 1e-3 <= x <= 1e8)]
Part = Annotated[float, Allowed("a number in [0, 1]", lambda x: 0 <= x <= 1)]
SomePart = Annotated[float, Allowed("a number in (0, 1]", lambda x: 0 < x <= 1)]
Beta = Annotated[float, Allowed("a number in [0, 1)", lambda x: 0 <= x < 1)]
FieldName = Annotated[str, Allowed("a field's name, as seed or optimizer.lr", bool)]
Name = Annotated[str, Allowed("a name", lambda name: bool(name) and "\0" not in name)]
FilePath = Annotated[str, Allowed("a path", lambda path: bool(path) and "\0" not in path)]


def check_fields(config: Any) -> None:
    """Raises ValueError unless every field of a dataclass holds what its annotation says, `Allowed` included."""
    for field, hint in get_type_hints(type(config), include_extras=True).items():
        got = getattr(config, field)
        require(_fits(got, hint), field, got, _words(hint))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass of this kind that `asdict`, perhaps by way of JSON, has made such a dict of.

    What is missing in it has its default. Raises ValueError for what is no field, or does not fit.
    """
    require(isinstance(values, dict), kind.__name__, values, "its fields and their values")
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    require(not unknown, kind.__name__, unknown, f"only its fields, {', '.join(hints)}")
    read = {}
    for name, value in values.items():
        if is_dataclass(hints[name]) and isinstance(value, dict):
            value = from_dict(hints[name], value)
        read[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**read)
    except TypeError as error:  # a field without a default
        raise ValueError(f"{kind.__name__}: got {error}, expected all fields that have no default") from error


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass and their values, as JSON gives them back."""
    return json.loads(json.dumps(asdict(config)))


def with_defaults(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What `as_json` has made of a dataclass of this kind, perhaps in an earlier version, and the defaults of fields
    that it lacks, likewise."""
    hints, found = get_type_hints(kind), dict(values)
    for field in fields(kind):
        default, name = field.default, field.name
        if is_dataclass(hints[name]) and isinstance(found.get(name), dict):
            found[name] = with_defaults(hints[name], found[name])
        elif name not in found and default is not MISSING:
            found[name] = asdict(default) if is_dataclass(type(default)) else default
    return json.loads(json.dumps(found))


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _fits(value, inner[0]) and all(note.test(value) for note in inner[1:] if isinstance(note, Allowed))
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if kind is tuple:
        expected = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(expected) and all(map(_fits, value, expected))
    if hint is float:
        return isinstance(value, float) or (_fits(value, int) and abs(value) < 2**1000)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))


def _words(hint: Any) -> str:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        notes = [note.words for note in inner[1:] if isinstance(note, Allowed)]
        return notes[-1] if notes else _words(inner[0])
    if kind in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is tuple:
        return f"a tuple of {_words(inner[0])}"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
    return names.get(hint) or f"a {hint.__name__}"
