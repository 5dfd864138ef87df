"""A result under way: started now, waited for as late as possible."""

from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result", covariant=True)
Mapped = TypeVar("Mapped")


class Pending(Generic[Result]):
    """What a transfer will bring. `wait()` may be called once; a second call is a RuntimeError."""

    def __init__(self, finish: Callable[[], Result]):
        self._finish: Callable[[], Result] | None = finish

    def wait(self) -> Result:
        if self._finish is None:
            raise RuntimeError("wait() was called twice on one transfer")
        finish, self._finish = self._finish, None
        return finish()

    def then(self, function: Callable[[Result], Mapped]) -> "Pending[Mapped]":
        """The same transfer, with its result passed through `function` on arrival."""
        return Pending(lambda: function(self.wait()))
