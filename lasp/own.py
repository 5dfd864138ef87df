"""A user's own code by its name, MODULE:NAME."""

import importlib
import os
import re
import sys
from typing import Any

from lasp.fields import require

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_own(field: str, name: str) -> Any:
    """The class or function that a module calls so. The folder that a process works in is looked through last.

    Raises ValueError, naming the field, if there is no such module, or none of that name in it.
    """
    require(OWN.fullmatch(name) is not None, field, name, "MODULE:NAME")
    module, _, own = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is the module that misses another one
        where = "a module in this folder or on PYTHONPATH"
        raise ValueError(f"{field}: got {name!r} (no module {error.name!r}), expected {where}") from error
    kind = getattr(found, own, None)
    where = getattr(found, "__file__", module)
    require(callable(kind), field, name, f"a class or function in {where}")
    return kind
