"""Rows that are looked up in a parameter: a product with one-hot rows, as embeddings are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from singd_core._array import Array
from singd_core.layers import Embedding, Sample
from singd_jax._axes import View
from singd_jax._calls import EMBEDDING, EXPAND, Call, atoms, features, in_order


def gather(
    params: Mapping[str, Any], view: View, index: Sequence[int], y: Sequence[int]
) -> Call | str:
    """Rows looked up in a parameter by an index of shape `index`; or why it is no embedding."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    picked = [d for d, n in enumerate(view.shape) if sizes[d] != n]
    if len(picked) != 1 or numbers.operand_batching_dims:
        return "indexed along several axes"
    (axis,), mapped = picked, list(numbers.start_index_map)
    collapsed, offsets = tuple(numbers.collapsed_slice_dims), list(numbers.offset_dims)
    if collapsed == ():  # as vmap makes it of a single index
        offsets.remove(numbers.offset_dims[axis])
    # whatever else is an index has one place to be, or to be clipped to
    mode = str(params["mode"])
    clipped = mapped == [axis] or mode.endswith(("CLIP", "PROMISE_IN_BOUNDS"))
    if collapsed not in ((), (axis,)) or sizes[axis] != 1 or axis not in mapped or not clipped:
        return "indexed in part"
    rest = [d for d in range(len(view.dims)) if d != axis]
    free = [d for d in range(len(y)) if d not in offsets]
    outs, entries = atoms(view, rest), view.shape[axis]
    layer = Embedding(entries)

    def places(x: Array) -> Array:
        i = x[..., mapped.index(axis)]
        if mode.endswith("CLIP"):
            return jnp.clip(i, 0, entries - 1)
        # what lies outside gives nothing; negative indices were made positive before
        return i if mode.endswith("PROMISE_IN_BOUNDS") else jnp.where(i < 0, entries, i)

    def inputs(x: Array, bias: bool, how: str, sample: Sample | None) -> Array:
        return layer.inputs(places(x), bias=bias, kfac_approx=how, sample=sample)[0]

    def outputs(g: Array, how: str, sample: Sample | None) -> Array:
        g = features(g, (), free, offsets, outs)
        return layer.outputs(g, kfac_approx=how, loss_average=None, sample=sample)[0]

    def seen(x: Array, g: Array) -> Array:
        """The gradient of what was looked up, zeros where nothing was."""
        inside = jnp.expand_dims(places(x) < entries, sorted(offsets))
        return jnp.where(inside, g, 0)

    def product(x: Array, g: Array) -> Array:
        B, at = outputs(g, EXPAND, None), places(x).reshape(-1)
        return jnp.zeros((B.shape[-1], entries), B.dtype).at[:, at].add(B.T, mode="drop")

    return Call(
        kind=EMBEDDING,
        view=view,
        stack=view.stack,
        outs=in_order(outs),
        ins=view.dims[axis],
        along=((),) * len(y),
        rows=math.prod(index[:-1]),
        examples=math.prod(index[:-1]),
        leading=index[0] if len(index) > 1 else None,
        inputs=inputs,
        outputs=outputs,
        product=product,
        seen=seen if mode.endswith("FILL_OR_DROP") else None,
        reduces=False,
        takes_bias=False,
    )
