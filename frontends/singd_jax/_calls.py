"""What one product of a parameter with data says of its layer, and the rows it gives.

Everything here only rearranges: the rows themselves are made by the core's kinds of layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_core.layers import Convolution, Linear, Sample
from singd_jax._axes import Atom, Group, View, merged, reshaped, size
from singd_jax._reasons import reason

EXPAND, EMBEDDING = "expand", "embedding"
Cut: TypeAlias = tuple[int, int, int]  # axis, start, length


@dataclasses.dataclass(frozen=True)
class Call:
    """One product of a view with data.

    Attributes:
        kind: What a person calls it.
        view: The parameter.
        stack: Axes over which it is a stack of layers of their own; axes of scans come first.
        outs: The atoms of the matrix's rows, in order, not merged.
        ins: The atoms of the matrix's columns.
        along: For each axis of the product the atoms of the parameter, empty for rows.
        rows: How many rows it has if every position is one.
        examples: How many if the rows of an example are averaged.
        inputs: The rows A of the other operand, as `inputs(x, bias, kfac_approx, sample)`; of a
            ragged product x is a pair of it and the sizes of the groups.
        outputs: The rows B of the gradient, as `outputs(g, kfac_approx, sample)`.
        product: BᵀA, the gradient of the matrix, where A is not written out.
        reduces: Whether it is known which rows belong to the same example.
        guesses: Whether it is a guess which, since several axes are as long as the batch.
        leading: The length of the first axis of the rows, by custom the batch.
        takes_bias: Whether its rows can have a column of ones.
        times: How often it runs with one matrix: for each step of a scan, and on each device.
        in_turn: With how many matrices of a stack it runs, one in each step of a scan.
        sizes: How many rows each matrix of the stack has, where x tells.
        seen: What `outputs` takes in the place of g, where x tells which of it reaches the weight.
        overlap: In how many rows an entry of the other operand takes part.
        code: Equal for calls that make rows by the same code, or None.
    """

    kind: str
    view: View
    stack: tuple[Group, ...]
    outs: tuple[Atom, ...]
    ins: tuple[Atom, ...]
    along: tuple[tuple[Atom, ...], ...]
    rows: int
    examples: int
    inputs: Callable[[Any, bool, str, Sample | None], Array]
    outputs: Callable[[Any, str, Sample | None], Array]
    product: Callable[[Array, Array], Array] | None = None
    reduces: bool = True
    guesses: bool = False
    leading: int | None = None
    takes_bias: bool = True
    times: int = 1
    in_turn: int = 1
    sizes: Callable[[Any], Array] | None = None
    seen: Callable[[Any, Array], Any] | None = None
    overlap: float = 1.0
    code: Any = None

    def operands(self, x: Any, g: Array, factor: Any) -> tuple[Any, Any]:
        """What `inputs` and `outputs` take, of a weight that is multiplied by a number or None."""
        x, g = jax.tree.map(wide, (x, g))
        if factor is not None and self.kind == EMBEDDING:
            g = _times(g, factor)
        elif factor is not None:
            x = (_times(x[0], factor), *x[1:]) if isinstance(x, tuple) else _times(x, factor)
        return x, g if self.seen is None else self.seen(x, g)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What two products of one layer must have in common."""
        return self.stack, merged(self.outs), merged(self.ins), self.view.flips

    @property
    def transposed(self) -> tuple[Any, ...]:
        """The layout of the transposed matrix."""
        return self.stack, merged(self.ins), merged(self.outs), self.view.flips

    def of_part(self, x: Cut | None, g: Cut | None) -> Call:
        """The same, of operand and gradient that belong to it only in part."""
        inputs, outputs = self.inputs, self.outputs
        return dataclasses.replace(
            self,
            code=None,
            inputs=lambda a, bias, how, sample: inputs(_cut(a, x), bias, how, sample),
            outputs=lambda b, how, sample: outputs(_cut(b, g), how, sample),
        )


def dot_general(
    params: Mapping[str, Any], side: int, view: View, x: Sequence[int], batch_size: int | None
) -> Call | str:
    """A `dot_general` whose operand number `side` is the parameter, the other of shape `x`.

    Returns why not if it is no product of matrices.
    """
    contract, batch = params["dimension_numbers"]
    wc, wb, xc, xb = contract[side], batch[side], contract[1 - side], batch[1 - side]
    wf = [i for i in range(len(view.dims)) if i not in (*wc, *wb)]
    if not wc and not wf:  # a scale as an einsum has it, and no stack of matrices 1×1
        return reason("mul")
    xf = [i for i in range(len(x)) if i not in (*xc, *xb)]
    nb, nf, nw = len(xb), len(xf), len(wf)
    as_long = [k for k, i in enumerate(xf) if x[i] == batch_size]
    of_batch = as_long[:1]
    order = [*of_batch, *(k for k in range(nf) if k not in of_batch)]
    y_free = [nb + k if side == 1 else nb + nw + k for k in order]
    y_outs = [nb + nf + k if side == 1 else nb + k for k in range(nw)]
    ins, outs = [atoms(view, dims) for dims in (wc, wf)]
    along: list[tuple[Atom, ...]] = [()] * (nb + nf + nw)
    for k, i in enumerate(wb):
        along[k] = view.dims[i]
    for k, i in zip(y_outs, wf, strict=True):
        along[k] = view.dims[i]

    def inputs(x: Array, bias: bool, how: str, sample: Sample | None) -> Array:
        x, how = features(x, xb, [xf[k] for k in order], xc, ins), how if of_batch else EXPAND

        def one(a: Array) -> Array:
            return Linear().inputs(a, bias=bias, kfac_approx=how, sample=sample)[0]

        return _stacked(one, nb)(x)

    def outputs(g: Array, how: str, sample: Sample | None) -> Array:
        g, how = features(g, range(nb), y_free, y_outs, outs), how if of_batch else EXPAND

        def one(b: Array) -> Array:
            return Linear().outputs(b, kfac_approx=how, loss_average=None, sample=sample)[0]

        return _stacked(one, nb)(g)

    rows = math.prod(x[i] for i in xf)
    return Call(
        kind="dense",
        view=view,
        stack=view.stack + tuple(view.dims[i] for i in wb),
        outs=in_order(outs),
        ins=in_order(ins),
        along=tuple(along),
        rows=rows,
        examples=x[xf[of_batch[0]]] if of_batch else rows,
        inputs=inputs,
        outputs=outputs,
        reduces=bool(of_batch) or nf == 0,
        leading=x[xf[0]] if xf else None,
        guesses=len(as_long) > 1,
        code=(params["dimension_numbers"], side, view.dims, tuple(x), batch_size),
    )


def convolution(params: Mapping[str, Any], view: View, y: Sequence[int]) -> Call | str:
    """A convolution with a parameter as its kernel and a result of shape `y`; or why not."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return "kernel of a convolution with batch groups"
    o, i, *spatial = numbers.rhs_spec
    kernel = tuple(view.shape[d] for d in spatial)
    split = reshaped((view.dims[o],), (groups, view.shape[o] // groups))
    if split is None:
        return "kernel of a convolution whose groups are no part of it"
    stack, outs = split if groups > 1 else ((), split[1])
    dilated = any(n != 1 for n in params["lhs_dilation"])
    negative = any(n < 0 for pair in params["padding"] for n in pair)
    padding = 0 if dilated or negative else tuple(tuple(pair) for pair in params["padding"])
    layer = Convolution(
        kernel,
        stride=tuple(params["window_strides"]),
        padding=padding,
        dilation=tuple(params["rhs_dilation"]),
        groups=groups,
    )

    def inputs(x: Array, bias: bool, how: str, sample: Sample | None) -> Array:
        x = jnp.transpose(x, numbers.lhs_spec)
        if dilated or negative:
            zeros = zip(params["padding"], params["lhs_dilation"], strict=True)
            along = [(0, 0, 0)] * 2 + [(lo, hi, n - 1) for (lo, hi), n in zeros]
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), along)
        return layer.inputs(x, bias=bias, kfac_approx=how, sample=sample)[0]

    def outputs(g: Array, how: str, sample: Sample | None) -> Array:
        g = jnp.transpose(g, numbers.out_spec)
        return layer.outputs(g, kfac_approx=how, loss_average=None, sample=sample)[0]

    along: list[tuple[Atom, ...]] = [()] * len(y)
    along[numbers.out_spec[1]] = (*stack, *outs)
    grouped = f", {groups} groups" if groups > 1 else ""
    return Call(
        kind=f"{'transposed ' * dilated}convolution {len(kernel)}d{grouped}",
        view=view,
        stack=view.stack + ((stack,) if groups > 1 else ()),
        outs=outs,
        ins=atoms(view, (i, *spatial)),
        along=tuple(along),
        rows=math.prod(y) // y[numbers.out_spec[1]],
        examples=y[numbers.out_spec[0]],
        leading=y[numbers.out_spec[0]],
        inputs=inputs,
        outputs=outputs,
        overlap=layer.overlap,
    )


def wide(x: Array) -> Array:
    """`x`, in float32 if its numbers have one byte: they cannot be scaled or added up in that."""
    narrow = x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if narrow else x


def _times(x: Array, factor: Any) -> Array:
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else None
    return x * jnp.asarray(factor, dtype)


def atoms(view: View, dims: Sequence[int]) -> tuple[Atom, ...]:
    """The atoms of several axes of a view, one after the other."""
    return tuple(atom for i in dims for atom in view.dims[i])


def _order(atoms: Sequence[Atom]) -> list[int]:
    return sorted(range(len(atoms)), key=lambda i: (atoms[i][0], -atoms[i][1]))


def in_order(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """Atoms in the order that the leaf has them in."""
    return tuple(atoms[i] for i in _order(atoms))


def features(
    x: Array,
    stack: Sequence[int],
    free: Sequence[int],
    last: Sequence[int],
    atoms: Sequence[Atom],
) -> Array:
    """`x` as (*stack, *free, last), the last axes joined in the order that the leaf has them in."""
    x = jnp.transpose(x, (*stack, *free, *last))
    kept = x.shape[: len(stack) + len(free)]
    if len(atoms) > 1:
        x = x.reshape(*kept, *(n for *_, n in atoms))
        first = len(kept)
        x = jnp.transpose(x, (*range(first), *(first + i for i in _order(atoms))))
    return x.reshape(*kept, size(tuple(atoms)))


def _stacked(f: Callable[[Array], Array], times: int) -> Callable[[Array], Array]:
    for _ in range(times):
        f = jax.vmap(f)
    return f


def _cut(x: Array, cut: Cut | None) -> Array:
    return x if cut is None else jax.lax.slice_in_dim(x, cut[1], cut[1] + cut[2], axis=cut[0])


def shape_of(x: Any, cut: Cut | None) -> tuple[int, ...]:
    """The shape of an array, or of its part."""
    shape = tuple(x.shape)
    return shape if cut is None else (*shape[: cut[0]], cut[2], *shape[cut[0] + 1 :])
