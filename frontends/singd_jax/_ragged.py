"""Rows of a ragged product: groups of rows, each multiplied with a weight of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_core.layers import Sample
from singd_jax._axes import View
from singd_jax._calls import Call, atoms, features, in_order
from singd_jax._reasons import reason


def ragged_dot(params: Mapping[str, Any], view: View, x: Sequence[int], groups: int) -> Call | str:
    """A `ragged_dot` of data of shape `x` with a stack of weights, one for each group of rows."""
    numbers = params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = numbers.dot_dimension_numbers
    (ragged,), grouped = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    free = [i for i in range(len(x)) if i not in (*xc, *xb)]
    if len(grouped) != 1 or free != [ragged] or params["group_offset"] is not None:
        return reason("ragged_dot_general")
    wf = [i for i in range(len(view.dims)) if i not in (*wc, *wb, *grouped)]
    ins, outs, n, nb = atoms(view, wc), atoms(view, wf), x[ragged], len(xb)

    def rows(x: Array, sizes: Array, *, sample: Sample | None) -> Array:
        """Rows (n, d) by group, (groups, most, d): zeros where a group has fewer."""
        most = n if sample is None else min(n, sample.most)
        sizes, j = sizes.astype(jnp.int32)[:, None], jnp.arange(most)
        first = jnp.cumsum(sizes, axis=0) - sizes
        if most == n:
            at, share = j, jnp.ones((groups, 1), x.dtype)
        else:
            size = jnp.maximum(sizes, 1)
            # j · size / most in 32 bits
            strided = j * (size // most) + j * (size % most) // most
            start = sample.start(size)  # type: ignore[arg-type, union-attr]
            at = jnp.where(sizes > most, (start + strided) % size, j)
            share = jnp.sqrt(jnp.maximum(size / most, 1.0)).astype(x.dtype)
        found = x.at[first + at].get(mode="clip") * share[..., None]
        return jnp.where((j < sizes)[..., None], found, 0)

    def stacked(x: Array, sizes: Array, sample: Sample | None) -> Array:
        one = functools.partial(rows, sample=sample)
        for _ in range(nb):
            one = jax.vmap(one)
        return one(x, jnp.broadcast_to(sizes, (*x.shape[:nb], groups)))

    def inputs(x: tuple[Array, Array], bias: bool, how: str, sample: Sample | None) -> Array:
        return stacked(features(x[0], xb, free, xc, ins), x[1], sample)

    def outputs(g: tuple[Array, Array], how: str, sample: Sample | None) -> Array:
        of_g = features(g[0], range(nb), [nb], range(nb + 1, nb + 1 + len(wf)), outs)
        return stacked(of_g, g[1], sample)

    return Call(
        kind="ragged",
        view=view,
        stack=(*view.stack, *(view.dims[i] for i in (*wb, *grouped))),
        outs=in_order(outs),
        ins=in_order(ins),
        along=(*(view.dims[i] for i in wb), (), *(view.dims[i] for i in wf)),
        rows=n,
        examples=n,
        inputs=inputs,
        outputs=outputs,
        reduces=False,
        takes_bias=False,
        sizes=lambda x: x[1],
        seen=lambda x, g: (g, x[1]),
    )
