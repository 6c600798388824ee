"""Laws of torch: compiled, mapped, differentiated and without data, a structure is the same."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from singd_core.structures.base import Structure
from singd_core.testing.draw import Case
from singd_core.testing.fake_cuda import fake_cuda
from singd_core.testing.law import law
from singd_core.testing.laws_arrays import arguments
from singd_core.testing.laws_jax import check_gradient, compare, in_numpy, scalar
from singd_core.testing.laws_optimizer import (
    compare_steps,
    draw_step,
    optimizer_of,
    step,
    step_in_numpy,
)
from singd_core.testing.mismatch import require
from singd_core.testing.operations import OPERATIONS, arrays, dtype_of, everything


def _recent(*least: int) -> tuple[str, ...]:
    """The backends of a law that asks for a recent torch: none that is older."""
    try:
        found = tuple(int(part) for part in version("torch").split(".")[:2])
    except PackageNotFoundError:
        found = (0, 0)
    return ("torch",) if found >= least else (f"torch {'.'.join(map(str, least))}",)


# Older versions cannot trace all of the core; the frontend takes compiled layers from this one on.
_RECENT = _recent(2, 13)


def _torch() -> Any:
    importlib.import_module("singd_torch._pytree").register_trees()
    return importlib.import_module("torch")


@law(backends=("torch",), dtypes=("float32",), guard=True, examples=1, sizes=(5,))
def torch_pytree(case: Case) -> None:
    """A structure is a pytree of torch: its leaves are its arrays, it is rebuilt of anything."""
    _torch()
    pytree, L = importlib.import_module("torch.utils._pytree"), case.member()
    leaves, spec = pytree.tree_flatten(L)
    require(len(leaves) == len(list(L.named_arrays())), f"it has {len(leaves)} leaves")
    for leaf, (name, a) in zip(leaves, L.named_arrays(), strict=True):
        require(leaf is a, f"the leaf of {name!r} is another array")
    require(pytree.tree_structure(case.member("R")) == spec, "two members differ as trees")
    case.equal(pytree.tree_unflatten(leaves, spec), L)
    pytree.tree_unflatten([object()] * len(leaves), spec)
    case.same(pytree.tree_map(lambda a: 2.0 * a, L), lambda L: 2.0 * L, L)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch = _torch()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")

    def quiet(*given: Any) -> Any:
        with warnings.catch_warnings():
            # array-api-compat asks cached functions which library an array is of
            warnings.filterwarnings("ignore", message=".*lru_cache", category=UserWarning)
            return compiled(*given)

    return quiet


@law(backends=_RECENT, dtypes=("float32",), examples=1, sizes=(5,))
def torch_compile(case: Case) -> None:
    """Every operation compiles into one graph, and gives the same."""
    given = arguments(case, c=case.to(0.5))
    compare(case, _compiled(everything)(*given), everything(*in_numpy(case, *given)))


@law(backends=("torch",), dtypes=("float32",), examples=1, sizes=(5,))
def torch_vmap(case: Case) -> None:
    """Under `torch.func.vmap` over a stack every operation gives the stack of its results."""

    def mapped(*given: Any) -> dict[str, Any]:  # torch maps nothing that writes to `out`
        return {name: f(*given) for name, f in OPERATIONS.items() if name != "apply_into"}

    torch, stack = _torch(), arguments(case, (2,), c=case.to([0.5, 2.0]))
    with warnings.catch_warnings():
        # some operations are mapped by a loop
        warnings.filterwarnings("ignore", message=".*batching rule", category=UserWarning)
        found = torch.func.vmap(mapped)(*stack)
    compare(case, found, mapped(*in_numpy(case, *stack)))


@law(backends=("torch",), dtypes=("float32",), examples=1, sizes=(5,))
def torch_grad(case: Case) -> None:
    """`torch.autograd` of a function of a member agrees with its differences."""
    torch, case.floats = _torch(), True
    L, R, X = case.member("L"), case.member("R"), case.rows()
    L = L.map(lambda a: a.clone().requires_grad_())
    leaves = [a for _, a in L.named_arrays()]
    found = torch.autograd.grad(scalar(L, X, torch), leaves)
    check_gradient(case, L, R, X, L.rebuild(found))


def _without_data(case: Case, move: Any, place: str, context: Any) -> None:
    """Run every operation on arrays without data, and compare shapes, dtypes and the device."""
    given = arguments(case, c=case.to(0.5))
    expected = everything(*in_numpy(case, *given))
    with context:
        moved = [x.map(move) if isinstance(x, Structure) else move(x) for x in given]
        for name, operation in OPERATIONS.items():
            try:
                result = operation(*moved)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error
            dtype = dtype_of(name, case.to(0.0))
            for (_, a), (_, b) in zip(arrays(result), arrays(expected[name]), strict=True):
                same = a.shape == b.shape and a.dtype == dtype
                require(same, f"{name}: expected {b.shape} {dtype}, got {a.shape} {a.dtype}")
                require(a.device.type == place, f"{name}: expected {place}, got {a.device}")


@law(backends=("torch",), dtypes=("float32", "bfloat16"), guard=True, examples=1, sizes=(5,))
def torch_meta(case: Case) -> None:
    """Every operation runs on the device `meta`, without data."""
    _without_data(case, lambda a: a.to("meta"), "meta", contextlib.nullcontext())


@law(backends=("torch",), dtypes=("float32", "bfloat16"), guard=True, examples=1, sizes=(5,))
def torch_fake_cuda(case: Case) -> None:
    """Every operation runs on a fake GPU, makes its arrays there and reads nothing back."""
    torch = _torch()
    move = lambda a: torch.empty(a.shape, dtype=a.dtype, device="cuda")  # noqa: E731
    _without_data(case, move, "cuda", fake_cuda())


def _step_without_data(case: Case, place: str, context: Any) -> None:
    torch, optimizer, given = _torch(), optimizer_of(case), draw_step(case)
    with context:
        moved = [torch.empty(x.shape, dtype=x.dtype, device=place) for x in given]
        change, after = step(optimizer, optimizer.init({"W": moved[0]}), *moved)
    for name, a in (("the change of W", change), *after.named_arrays()):
        require(a.device.type == place, f"{name}: expected {place}, got {a.device}")


@law(backends=("torch",), dtypes=("float32", "bfloat16"), examples=1, sizes=(4,))
def torch_step_without_data(case: Case) -> None:
    """A whole optimizer step runs on the device `meta` and on a fake GPU."""
    _step_without_data(case, "meta", contextlib.nullcontext())
    _step_without_data(case, "cuda", fake_cuda())


@law(backends=_RECENT, dtypes=("float32",), examples=1, sizes=(4,))
def torch_step_compiles(case: Case) -> None:
    """A whole optimizer step compiles into one graph, and gives what NumPy gives."""
    optimizer, given = optimizer_of(case), draw_step(case)
    state = optimizer.init({"W": given[0]})
    compiled = _compiled(lambda state, *given: step(optimizer, state, *given))
    compare_steps(case, compiled(state, *given), step_in_numpy(case, given))
