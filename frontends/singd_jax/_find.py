"""Finding the layers of a loss from its shapes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from singd_core._array import ranged
from singd_core._settings import plain
from singd_core.layers.base import is_expand, loss_terms
from singd_core.structures import choose
from singd_jax._enter import CALLS
from singd_jax._layers import Layers, pair
from singd_jax._loss import Leaves, evaluate, parted, size_of_batch
from singd_jax._search import Search
from singd_jax._trace import Tracer


def find_layers(
    loss: Callable[..., Any],
    *,
    structures: Any = None,
    kfac_approx: str = "expand",
    loss_average: str | int | None = "batch",
    batch_size: Any = None,
) -> Callable[..., Layers]:
    """The layers of a loss `loss(params, *batch)`, found without computing anything.

    Args:
        loss: A function that `jax.grad` takes, with auxiliary output or without.
        structures: Structures of the factors K (inputs) and C (outputs), one for both, or "cost:n":
            the richest that cost little beside n rows a step. The table shows them, and the
            optimizer takes them unless it has others. None is the structures of the recipe.
        kfac_approx: "expand" or "reduce": how positions that share the weight are treated.
        loss_average: What the loss is a mean of: "batch", "batch+sequence", a number of terms, or
            None for a sum.
        batch_size: The number of examples in the batch, or a function of `*batch` that returns it.
            None reads it off the first axis of the arrays in the batch. If these do not agree or
            there are none, it is read off the first axis of all data that parameters multiply.
            Inside shard_map the batch is a part of the whole, and this must be given.

    Returns:
        A function of `params, *batch`, arrays or their shapes, that returns the layers.

    Raises:
        ValueError: If an option is unknown, the batch size cannot be found, or the curvatures of
            two layers would have one name.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(params, x, y):
        ...     return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) * params["s"] - y) ** 2)
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "s": jnp.ones(2)}
        >>> found = find_layers(loss, structures="dense")
        >>> print(found(params, jnp.ones((8, 3)), jnp.ones((8, 2))))
        parameter  shape  kind   matrix  K      C      bytes of factors
        w + b      3×2    dense  2×4     dense  dense                80
        s          2      AdamW                                          multiplied entry by entry
    """
    is_expand(kfac_approx)
    loss_terms(loss_average, 1, ())
    choose.resolve(pair(structures))

    def alone(*arguments: Any, **keywords: Any) -> Any:
        """The loss without auxiliary output, which no gradient comes from."""
        result = loss(*arguments, **keywords)
        return result[0] if isinstance(result, tuple) else result

    def find(params: Any, *batch: Any, **keywords: Any) -> Layers:
        with _explaining(params):
            return found(params, *batch, **keywords)

    def found(params: Any, *batch: Any, **keywords: Any) -> Layers:
        leaves = Leaves.of(params)
        needed = loss_average == "batch" or kfac_approx == "reduce"
        first = functools.partial(leading, alone, leaves, batch, keywords)
        n = size_of_batch(batch_size, batch, keywords, first) if needed else None
        tracer = Tracer(CALLS, n)
        _follow(alone, tracer, leaves, batch, keywords)
        search = Search(tracer.noted, leaves)
        search.run(kfac_approx, loss_average)
        arrays = leaves.named.items()
        return Layers(
            found=search.layers,
            others=search.others(),
            shapes={k: tuple(a.shape) for k, a in arrays},
            itemsizes={k: ranged(jnp.zeros((0,), a.dtype)).dtype.itemsize for k, a in arrays},
            structures=pair(structures),
            kfac_approx=kfac_approx,
            loss_average=plain(loss_average),
            batch_size=batch_size,
            vectors=frozenset(leaves.names[i] for i in tracer.noted.vectors),
        )

    return find


@contextlib.contextmanager
def _explaining(params: Any) -> Iterator[None]:
    """Say what is wrong where a loss meets None in the place of what belongs to a model.

    Raises:
        TypeError: If it does.
        NameError: If it names an axis of devices that is not there.
    """
    try:
        yield
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            f"{error}. Layers are found without it: give find_layers the loss without its "
            "lax.pmean or lax.psum, and value_and_grad the loss with them, inside of jax.pmap, "
            "jax.vmap or jax.shard_map"
        ) from error
    except (TypeError, AttributeError) as error:
        has_none = any(
            leaf is None for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: leaf is None)
        )
        if "NoneType" not in str(error) or not has_none:
            raise
        raise TypeError(
            f"the loss met None in the parameters ({error}): give tx.init and find_layers the "
            "model itself, as the loss takes it, not a filtered one, such as "
            "eqx.filter(model, eqx.is_inexact_array)"
        ) from error


def leading(
    loss: Callable[..., Any], leaves: Leaves, batch: tuple[Any, ...], keywords: Mapping[str, Any]
) -> set[Any]:
    """The lengths of the first axes of what parameters multiply in a loss."""
    tracer = Tracer(CALLS, None)
    _follow(loss, tracer, leaves, batch, keywords)
    return tracer.leading - {None}


def _follow(
    loss: Callable[..., Any],
    tracer: Tracer,
    leaves: Leaves,
    batch: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    arrays, join = parted(batch, keywords)  # what a layer is must not depend on their values
    jax.eval_shape(
        lambda own, arrays: evaluate(loss, tracer, leaves, own, {}, *join(arrays)),
        list(leaves.arrays),
        arrays,
    )
