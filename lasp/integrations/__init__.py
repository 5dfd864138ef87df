"""Adapters to other frameworks. Each is a module of its own, imported by those who have that framework."""

from importlib.util import find_spec

from lasp.config import require


def require_transformers() -> None:
    """Raises ValueError if Transformers is not installed."""
    found = find_spec("transformers") is not None
    require(found, "transformers", "nothing of that name", "lasp's extra: pip install 'lasp-sp[huggingface]'")
