"""Operations in graphs: where torch.compile traces a call of one, it becomes one node, `torch.ops.lasp.NAME`.

The node runs the operation just as it runs without a graph, autograd included. What that keeps for backward stays in a
`Call`, an opaque handle that the compiled model carries from forward to backward, and that frees it:

    forward     NAME(arguments, learns) -> results, Call
    backward    backward(Call, gradients of results, tensors, learns) -> gradients of those that learn

A compiler gives memory that no later node reads to others. So a call keeps nothing that lies in the memory of its
arguments or results: backward gets these once more, kept or computed again as the compiler sees fit. Shapes alone are
known while a model is traced. A `Handle` is an argument that is no tensor, such as a batch's sequence: an input of the
graph, which serves the next batch too.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_origin

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._compile import _disable_dynamo
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lasp.kernels.fenwick import FenwickState
from lasp.kernels.parts import Part, Parts

AVAILABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # older ones break a graph at each operation
if AVAILABLE:
    from torch._library.opaque_object import MemberType, get_opaque_type_name, register_opaque_type
    from torch._opaque_base import OpaqueBase
else:
    OpaqueBase = object  # type: ignore[assignment, misc]

_AUTOGRAD = (
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutogradOther,
    DispatchKey.AutogradNestedTensor,
    DispatchKey.ADInplaceOrView,
)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Fake = Callable[..., Any]


class Handle(OpaqueBase):
    """What nodes may be given besides tensors and numbers. A compiled model serves others of the same `traced_facts`,
    from which the shapes of all results follow."""

    @property
    def traced_facts(self) -> list[object]:
        raise NotImplementedError


class Opaque(OpaqueBase):
    """What nodes may be given that graphs do not look into."""


def real(handle: Any) -> Any:
    """The handle that stands behind its stand-in, for shapes."""
    return getattr(handle, "real_obj", handle)


class _Place(NamedTuple):
    """Where a tensor lies in the memory of another: number `source` of those that backward is given, `layout` its
    strides."""

    source: int
    layout: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Saved:
    """What autograd saves: a tensor, or its place in one that backward is given again."""

    def __init__(self, x: Tensor):
        self.content: Tensor | _Place = x

    def settle(self, given: list[Tensor], others: list[Tensor]) -> None:
        """given: what backward is given again. others: what it is not, and what may be overwritten."""
        x = self.content
        assert isinstance(x, Tensor)
        for number, source in enumerate(given):
            if _share_memory(x, source) and x.dtype == source.dtype:
                offset = int(x.storage_offset() - source.storage_offset())
                self.content = _Place(number, source.stride(), x.size(), x.stride(), offset)
                return
        if any(_share_memory(x, other) for other in others):
            self.content = x.clone()

    def restore(self, given: list[Tensor]) -> Tensor:
        if isinstance(self.content, Tensor):
            return self.content
        number, layout, size, stride, offset = self.content
        source = given[number]
        if source.stride() != layout:
            source = source.new_empty_strided(source.shape, layout).copy_(source)
        return source.as_strided(size, stride, source.storage_offset() + offset)


class Call(OpaqueBase):
    """A call that has been made: its autograd graph. given: what its backward needs, while that runs."""

    def __init__(self) -> None:
        self.inputs: list[GradientEdge] = []
        self.outputs: list[GradientEdge | None] = []
        self.given: list[Tensor] = []

    def run(
        self, function: Callable[..., Any], arguments: dict[str, Any], learning: list[Tensor]
    ) -> tuple[list[Tensor], list[_Saved]]:
        """The results of function(**arguments), in which some tensors are learning, and what is saved of it."""
        saved: list[_Saved] = []

        def pack(x: Tensor) -> _Saved:
            saved.append(_Saved(x))
            return saved[-1]

        with saved_tensors_hooks(pack, lambda each: each.restore(self.given)):
            results = _tensors(function(**arguments))
        self.inputs = [get_gradient_edge(x) for x in learning]
        self.outputs = [get_gradient_edge(x) if x.requires_grad else None for x in results]
        return results, saved

    def backward(self, gradients: list[Tensor | None], given: list[Tensor]) -> tuple[Tensor | None, ...]:
        pairs = zip(self.outputs, gradients, strict=True)
        known = [(edge, d) for edge, d in pairs if edge is not None and d is not None]
        if not known:
            return (None,) * len(self.inputs)
        self.given = given
        try:
            outputs, of_outputs = zip(*known, strict=True)
            return torch.autograd.grad(outputs, self.inputs, of_outputs, allow_unused=True)
        finally:
            self.given = []


@dataclass(frozen=True)
class _Kind:
    """How an argument is written in a node: its type there, and there and back."""

    name: str
    write: Callable[[Any], Any] = lambda x: x
    read: Callable[[Any], Any] = lambda x: x


def _write_parts(parts: Parts) -> list[int]:
    return [parts.heads, *(number for part in parts.parts for number in (part.size, int(part.unit_length)))]


def _read_parts(numbers: list[int]) -> Parts:
    heads, *rest = numbers
    return Parts(heads, tuple(Part(*pair) for pair in zip(rest[::2], map(bool, rest[1::2]), strict=True)))


_KINDS: dict[Any, _Kind] = {
    Tensor: _Kind("Tensor"),
    Tensor | None: _Kind("Tensor?"),
    float | None: _Kind("float?"),
    int | None: _Kind("int?"),
    int: _Kind("int"),
    bool: _Kind("bool"),
    str: _Kind("str"),
    list[Tensor]: _Kind("Tensor[]"),
    Parts: _Kind("int[]", _write_parts, _read_parts),
    FenwickState | None: _Kind(
        "Tensor[]", lambda x: [] if x is None else list(x), lambda x: FenwickState(*x) if x else None
    ),
}


def traced(
    fake: Fake, *, reads: tuple[int, ...] = (), lasting: bool = False, casts: Callable[..., Any] | None = None
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Makes a function, or a method of a `Handle`, a node of graphs; elsewhere it is what it was. Arguments may be
    tensors, numbers, strings, `Handle`s and what is `Opaque`, by their annotations.

    fake: takes the same arguments by name, and returns a list of empty tensors like the results that there are.
    reads: which results its backward reads, to be kept for it in the place they have.
    lasting: its results outlive the call, so that a node gives copies of them.
    casts: what torch.autocast does to q, k and v, which it does not reach in a node.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        if not AVAILABLE:
            return apart(function)
        signature = inspect.signature(function)
        names = tuple(signature.parameters)
        defaults = {
            name: p.default for name, p in signature.parameters.items() if p.default is not inspect.Parameter.empty
        }
        kinds = tuple(_kind(p.annotation, function) for p in signature.parameters.values())
        writes = tuple(kind.write for kind in kinds)
        returns = _returns(signature.return_annotation)
        node = _define(function, names, kinds, fake, reads, lasting)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = defaults | dict(zip(names, args, strict=False)) | kwargs
            if casts is not None:
                given["q"], given["k"], given["v"] = casts(given["q"], given["k"], given["v"])
            written = [write(given[name]) for name, write in zip(names, writes, strict=True)]
            learns = [torch.is_grad_enabled() and x.requires_grad for x in _tensors(written)]
            return returns(node(*written, learns)[0])

        @wraps(function)
        def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return call(args, kwargs) if torch.compiler.is_dynamo_compiling() else function(*args, **kwargs)

        return called

    return decorate


def apart(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Breaks graphs: the function runs outside of them. (`torch.compiler.disable` would load the compiler at once.)"""
    return _disable_dynamo(function)


def open_to_graphs(cls: type[Handle], *attributes: str) -> None:
    """Says that graphs may call the methods of a handle's class, and look at these attributes."""
    if AVAILABLE:
        names = [name for name in dir(cls) if not name.startswith("__")]
        _MEMBERS.update(dict.fromkeys([*names, *attributes], MemberType.INLINED))


def _kind(annotation: Any, function: Callable[..., Any]) -> _Kind:
    if annotation is inspect.Parameter.empty:  # self
        return _Kind(_HANDLE)
    if get_origin(annotation) is Literal:
        return _KINDS[str]
    for opaque, name in ((Handle, _HANDLE), (Opaque, _OPAQUE)):
        if isinstance(annotation, type) and issubclass(annotation, opaque):
            return _Kind(name)
    if annotation not in _KINDS:
        raise TypeError(f"{function.__qualname__} has an argument of {annotation}, which no node takes")
    return _KINDS[annotation]


def _returns(annotation: Any) -> Callable[[list[Tensor]], Any]:
    """From the results of a node, which are those that there are, what the function returns."""
    if annotation is Tensor:
        return lambda results: results[0]
    if annotation == tuple[Tensor, Tensor | None]:
        return lambda results: (results[0], results[1] if len(results) > 1 else None)
    if annotation == tuple[Tensor, FenwickState | None]:
        return lambda results: (results[0], FenwickState(*results[1:]) if len(results) > 1 else None)
    return tuple


def _define(
    function: Callable[..., Any],
    names: tuple[str, ...],
    kinds: tuple[_Kind, ...],
    fake: Fake,
    reads: tuple[int, ...],
    lasting: bool,
) -> Callable[..., Any]:
    *owner, name = (each for each in function.__qualname__.split(".") if each != "<locals>")
    node = "_".join([*(each.lower() for each in owner), name])
    arguments = ", ".join(f"{kind.name} {'handle' if n == 'self' else n}" for n, kind in zip(names, kinds, strict=True))

    def decoded(written: Iterable[Any]) -> dict[str, Any]:
        return {name: kind.read(x) for name, kind, x in zip(names, kinds, written, strict=True)}

    def run(*written: Any) -> tuple[list[Tensor], Call]:
        *written, learns = written  # type: ignore[assignment]
        tensors = _tensors(written)
        leaves = [x.detach().requires_grad_(learn) for x, learn in zip(tensors, learns, strict=True)]
        call, arguments = Call(), decoded(_replaced(written, iter(leaves)))
        learning = [x for x in leaves if x.requires_grad]
        with _autograd(enabled=bool(learning)):
            results, saved = call.run(function, arguments, learning)
        results = [x.clone() if lasting else x.detach().contiguous() for x in results]
        results = _own(results, tensors)
        known = [results[i] for i in reads]
        others = [x for i, x in enumerate(results) if i not in reads]
        for each in saved:
            each.settle(tensors + known, others)
        return results, call

    def shapes(*written: Any) -> tuple[list[Tensor], Call]:
        return fake(**decoded(written[:-1])), Call()

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Call]) -> None:
        (*written, ctx.learns), (results, ctx.call) = inputs, output
        ctx.set_materialize_grads(False)
        ctx.places = [len(x) if isinstance(x, list) and _are_tensors(x) else isinstance(x, Tensor) for x in written]
        ctx.save_for_backward(*_tensors(written), *(results[i] for i in reads))

    def backward(ctx: Any, gradients: list[Tensor | None], _: None) -> tuple[Any, ...]:
        found = iter(torch.ops.lasp.backward(ctx.call, gradients, list(ctx.saved_tensors), ctx.learns))
        each = iter([next(found) if learns else None for learns in ctx.learns])
        of: list[Any] = []
        for place in ctx.places:
            if isinstance(place, bool):
                of.append(next(each) if place else None)
            else:
                of.append([next(each) for _ in range(place)])
        return *of, None

    op = torch.library.custom_op(
        f"lasp::{node}", run, mutates_args=(), schema=f"({arguments}, bool[] learns) -> (Tensor[], {_CALL})"
    )
    op.register_fake(shapes)
    op.register_autograd(backward, setup_context=keep)
    return getattr(torch.ops.lasp, node)


def _backward(call: Call, gradients: list[Tensor | None], tensors: list[Tensor], learns: list[bool]) -> list[Tensor]:
    with _autograd(enabled=False):
        found = iter(call.backward(gradients, tensors))
    learning = [x for x, learn in zip(tensors, learns, strict=False) if learn]
    given = [*tensors, *(d for d in gradients if d is not None)]
    return _own([_like(next(found), x) for x in learning], given)


def _backward_shapes(
    call: Call, gradients: list[Tensor | None], tensors: list[Tensor], learns: list[bool]
) -> list[Tensor]:
    return [torch.empty_like(x) for x, learn in zip(tensors, learns, strict=False) if learn]


def _like(gradient: Tensor | None, x: Tensor) -> Tensor:
    """The gradient, or zeros, laid out as shapes have it."""
    if gradient is None:
        return torch.zeros_like(x)
    wanted = torch.empty_like(x, device="meta").stride()
    return gradient if gradient.stride() == wanted else torch.empty_like(x).copy_(gradient)


def _own(results: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The results, contiguous or as they are, each in memory of its own."""
    owned: list[Tensor] = []
    for x in results:
        owned.append(x.clone() if any(_share_memory(x, other) for other in (*others, *owned)) else x)
    return owned


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _are_tensors(x: list[Any]) -> bool:
    return all(isinstance(each, Tensor) for each in x)


def _tensors(x: Any) -> list[Tensor]:
    """Those in it, in order."""
    if isinstance(x, Tensor):
        return [x]
    return [tensor for each in x for tensor in _tensors(each)] if isinstance(x, list | tuple) else []


def _replaced(x: Any, tensors: Any) -> Any:
    """x with other tensors."""
    if isinstance(x, Tensor):
        return next(tensors)
    return [_replaced(each, tensors) for each in x] if isinstance(x, list | tuple) else x


@contextmanager
def _autograd(enabled: bool) -> Iterator[None]:
    """Autograd inside a node, and its knowledge of views, where PyTorch has turned them off."""
    excluded, included = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    included = included.add(DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.set_grad_enabled(enabled):
        yield


if AVAILABLE:
    _MEMBERS = {"traced_facts": MemberType.INLINED}  # to which classes add theirs
    register_opaque_type(Call, typ="reference")
    register_opaque_type(Handle, typ="reference", guard_fn=lambda handle: handle.traced_facts, members=_MEMBERS)
    register_opaque_type(Opaque, typ="reference")
    _CALL, _HANDLE, _OPAQUE = (get_opaque_type_name(each) for each in (Call, Handle, Opaque))
    _run_backward = torch.library.custom_op(
        "lasp::backward",
        _backward,
        mutates_args=(),
        schema=f"({_CALL} call, Tensor?[] gradients, Tensor[] tensors, bool[] learns) -> Tensor[]",
    )
    _run_backward.register_fake(_backward_shapes)
