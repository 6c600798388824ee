"""A user's loss as a function of the leaves of its parameters."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from singd_core._array import Array
from singd_jax import _compat, _nnx
from singd_jax._axes import View
from singd_jax._spread import NONE, PARAMETERS, Perturbed
from singd_jax._tap import Ports
from singd_jax._trace import Tracer


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The trainable leaves of any pytree (a dict, an nnx state, an Equinox module).

    Attributes:
        names: Their names: the path's keys joined by dots.
        arrays: The leaves.
        others: The names of what is not trained, e.g. of what a mask leaves out: maybe a branch.
        numbers: Those among them of Python's numbers with a point, which are no arrays.
        join: Puts leaves back into the pytree.
        model: The pytree itself if it is a model of flax.nnx, whose variables a loss changes.
    """

    names: tuple[str, ...]
    arrays: tuple[Array, ...]
    others: frozenset[str]
    numbers: tuple[str, ...]
    join: Callable[[Sequence[Any]], Any]
    model: Any = None

    @classmethod
    def of(cls, params: Any) -> Leaves:
        """Those that are arrays of floating-point or complex numbers."""
        tree: Any
        flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_left_out)
        trained = [_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in flat]
        if _nnx.is_model(params):
            chosen = _nnx.trained(params, _is_left_out)
            trained = [a and b for a, b in zip(trained, chosen, strict=True)]
        paths = _without_wrappers([path for path, _ in flat])
        names = [_name(path) for path in paths]
        if len(set(names)) < len(names):  # {"a.b": ...} beside {"a": {"b": ...}}
            names = [jax.tree_util.keystr(path) for path in paths]
        if _nnx.is_model(params):
            held = _nnx.variables(params, _is_left_out)
            _refuse_shared([pair for *pair, own in zip(names, held, trained, strict=True) if own])

        def join(leaves: Sequence[Any]) -> Any:
            new = iter(leaves)
            pairs = zip(flat, trained, strict=True)
            return tree.unflatten([next(new) if own else leaf for (_, leaf), own in pairs])

        where = [i for i, own in enumerate(trained) if own]
        return cls(
            tuple(names[i] for i in where),
            tuple(flat[i][1] for i in where),
            frozenset(
                name if path else ""
                for (path, _), name, own in zip(flat, names, trained, strict=True)
                if not own
            ),
            tuple(
                name
                for (_, leaf), name in zip(flat, names, strict=True)
                if isinstance(leaf, (float, complex)) and not _is_array(leaf)
            ),
            join,
            params if _nnx.is_model(params) else None,
        )

    def changed(self, model: Any) -> list[Array]:
        """What of a model besides the leaves the loss may have changed: nothing but of nnx."""
        if self.model is None:
            return []
        flat = jax.tree.leaves(model, is_leaf=_is_left_out)
        pairs = zip(flat, _nnx.trained(model, _is_left_out), strict=True)
        return [leaf for leaf, own in pairs if not own and _is_array(leaf)]

    def keep(self, changed: Sequence[Array]) -> None:
        """Change the model in place as the loss has changed the copy that it was given."""
        if self.model is not None:
            tree: Any
            flat, tree = jax.tree.flatten(self.model, is_leaf=_is_left_out)
            new, trained = iter(changed), _nnx.trained(self.model, _is_left_out)
            for i, own in enumerate(trained):
                if not own and _is_array(flat[i]):
                    flat[i] = next(new)
            _nnx.update(self.model, tree.unflatten(flat))

    def leaves_out(self, name: str) -> bool:
        """Whether a leaf is none of those trained, or in a branch that is left out."""
        return any(
            branch in ("", name) or name.startswith((f"{branch}.", f"{branch}["))
            for branch in self.others
        )

    @property
    def named(self) -> dict[str, Array]:
        """The leaves by name."""
        return dict(zip(self.names, self.arrays, strict=True))

    def tree(self, values: Mapping[str, Any]) -> Any:
        """The pytree with a value for each leaf that has one, and optax's mark for none else."""
        none = optax.MaskedNode()
        return self._joined([values.get(name, none) for name in self.names], none)

    def gradients(self, leaves: Sequence[Array]) -> Any:
        """The pytree of gradients: None in place of what is not trained."""
        return self._joined(leaves, None)

    def _joined(self, values: Sequence[Any], other: Any) -> Any:
        """The pytree of values, with another one in place of what is not trained."""
        return jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, _Trained) else other,
            self.join([_Trained(value) for value in values]),
            is_leaf=lambda leaf: isinstance(leaf, _Trained),
        )


def _refuse_shared(named: Sequence[Any]) -> None:
    """Raise if a model of nnx has one variable in several places, which a pytree would part.

    Raises:
        ValueError: Naming two of them.
    """
    seen: dict[tuple[int, int], str] = {}
    for name, (variable, i) in named:
        other = seen.setdefault((id(variable), i), name)
        if other != name:
            raise ValueError(
                f"{other!r} and {name!r} are one variable of the model: give the params of graph, "
                "params, rest = nnx.split(model, nnx.Param, ...), and in the loss use "
                "nnx.merge(graph, params, rest)"
            )


@dataclasses.dataclass
class _Trained:
    """The value of a leaf, told apart from what is not trained."""

    value: Any


# What a loss raises under jax.jit that asks for values of its arguments.
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_IS_TRACED = (
    "singd_jax traces the loss to find its layers, as jax.jit does: the loss may not ask for the "
    "values of arrays. Write jnp.where or jax.lax.cond, make such values outside of the loss, or "
    "train without rows, with singd_jax.singd() and jax.value_and_grad."
)


def parted(
    batch: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a batch and its keywords, and what puts others into their places."""
    tree: Any
    flat, tree = jax.tree.flatten((batch, dict(keywords)))
    # a scalar of NumPy stays the number that it is: the length of a loop may be one
    which = [i for i, v in enumerate(flat) if _is_array(v) and not isinstance(v, np.generic)]

    def join(arrays: Sequence[Any]) -> Any:
        full = list(flat)
        for i, array in zip(which, arrays, strict=True):
            full[i] = array
        return tree.unflatten(full)

    return [flat[i] for i in which], join


def evaluate(
    loss: Callable[..., Any],
    tracer: Tracer,
    params: Leaves,
    leaves: Sequence[Array],
    ports: Ports,
    batch: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> tuple[Any, list[Array]]:
    """What the loss returns, evaluated by a tracer, and what it has changed of the model."""
    arrays, join = parted(batch, keywords)

    def function(leaves: Any, arrays: Any) -> Any:
        args, named = join(arrays)
        model = params.join(leaves)
        result = loss(model, *args, **named)
        for x in jax.tree.leaves(result):
            if not _is_array(x) and not isinstance(x, (int, float, complex)):
                raise TypeError(
                    f"the loss returns {x!r}, which is no array: return arrays alone, and make "
                    "what is none outside of the loss"
                )
        return result, params.changed(model)

    try:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(list(leaves), arrays)
    except _NEEDS_VALUES as error:
        error.add_note(_IS_TRACED)
        raise
    closed = _compat.without_dead_equations(closed)
    views = [
        View.of_leaf(i, leaf.shape) if is_followed(leaf) else None for i, leaf in enumerate(leaves)
    ]
    origins = [*views, *[None] * len(arrays)]
    # arrays of NumPy are no numbers in the code
    args = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in (*leaves, *arrays)]
    differ = [_compat.varying(a) for a in args]
    if any(differ):  # the loss is inside a shard_map
        tracer.spread.follow(closed.jaxpr, closed.consts, differ)
    marks = [*[frozenset([PARAMETERS])] * len(leaves), *[NONE] * len(arrays)]
    tracer.perturbed = Perturbed(closed.jaxpr, closed.consts, marks)
    gives = [i == 0 for i in range(len(closed.jaxpr.outvars))]  # the value, and nothing else
    results, _ = tracer.run(closed.jaxpr, closed.consts, args, origins, ports, gives)
    return jax.tree.unflatten(jax.tree.structure(shape), results)  # type: ignore[no-any-return]


def size_of_batch(
    given: Any,
    batch: tuple[Any, ...],
    keywords: Mapping[str, Any],
    leading: Callable[[], set[int]],
) -> int:
    """The batch size: the first axis of the arrays in the batch, unless it is given.

    Where they do not agree it is the first axis of all data which parameters multiply, which
    `leading` returns.

    Raises:
        ValueError: If neither agree on it.
    """
    if given is not None:
        return int(given(*batch, **keywords)) if callable(given) else int(given)
    flat, _ = jax.tree_util.tree_flatten_with_path((batch, dict(keywords)))
    sizes = {
        ("batch" + jax.tree_util.keystr(path[1:])): value.shape[0]
        for path, value in flat
        if _is_array(value) and value.ndim > 0 and not _is_key(value)
    }
    if len(set(sizes.values())) != 1:
        of_products = leading()
        if len(of_products) == 1:
            return of_products.pop()
        told = ", ".join(f"{name} {n}" for name, n in sizes.items()) or "there is no array"
        raise ValueError(
            "the batch size is not to be seen from the first axes of the arguments after the "
            f"parameters ({told}): give find_layers(loss, batch_size=...), a number or a function "
            "of these arguments"
        )
    return int(next(iter(sizes.values())))


def is_complex(array: Any) -> bool:
    """Whether an array holds complex numbers."""
    return bool(jnp.issubdtype(array.dtype, jnp.complexfloating))


def is_followed(array: Any) -> bool:
    """Whether a layer can be made of an array: of one that holds numbers, and no complex ones."""
    return bool(array.size) and not is_complex(array)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_left_out(value: Any) -> bool:
    return value is None or isinstance(value, optax.MaskedNode)


def _is_key(value: Any) -> bool:
    """Whether it is a key of a random generator, typed or of two numbers."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return True
    return bool(value.dtype == jnp.uint32) and tuple(value.shape) == (2,)


def _without_wrappers(paths: Sequence[Any]) -> list[Any]:
    """The paths without a last `.value` that is all of its branch: a variable of flax.nnx.

    `nnx.Optimizer` gives variables at the start, and their arrays in every step.
    """
    entries = collections.Counter(path[:-1] for path in paths)
    value = jax.tree_util.GetAttrKey("value")
    return [p[:-1] if p and p[-1] == value and entries[p[:-1]] == 1 else p for p in paths]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"
