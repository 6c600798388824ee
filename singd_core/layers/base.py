"""What a kind of layer says about itself, so that everything else can treat it as a matrix."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, NoReturn

from singd_core._array import Array, cast, concat
from singd_core._settings import plain
from singd_core.layers._sampling import Sample

Shape = tuple[int, ...]


class LayerKind(ABC):
    """A kind of layer, written as a linear map `z = W a`.

    A new kind is a frozen dataclass that writes the five abstract methods. (It must be hashable, so
    that layers of equal kind can be found.) The other methods have an answer that is right for most
    kinds. Rows are returned unscaled, with the numbers that scale them. So a caller can accumulate
    over micro-batches:

        U = Aᵀ A / N,     G = M Bᵀ B     (mathematics.md, section 1)

    With a `sample`, `inputs` and `outputs` may return fewer rows. These are multiplied by a number,
    so that their expected sums are the sums `AᵀA` and `BᵀB` of all rows. N and M always count all
    rows.

    With `kfac_approx="expand"`, `Bᵀ A` of all rows is the gradient of the weight as a matrix. The
    leading axes `*groups` below are separate layers that share a call. Most kinds have none.

    Array arguments are arrays of any library that follows the Python Array API standard.

    Attributes:
        diagonal_inputs: Whether the rows of `inputs` serve only for a diagonal K.
        has_rows: Whether there are rows. Otherwise the factors learn from gradients alone.
        stacks: Whether equal layers of one shape step as one along a first axis.
        is_plain: Whether each row is an entry of the layer's input, a vector or an index.
        is_convolution: Whether rows are patches of the kind's `windows`.
    """

    diagonal_inputs: ClassVar[bool] = False
    has_rows: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False
    is_convolution: ClassVar[bool] = False

    @property
    def is_turned(self) -> bool:
        """Whether the weight is stored as (d_in, d_out)."""
        return False

    @property
    def is_stack(self) -> bool:
        """Whether the weight has a first axis of matrices, as a stack of experts has."""
        return False

    @property
    def row_parts(self) -> Sequence[int | None]:
        """What the rows of a call are of: the whole layer, None, or one of its parts."""
        return (None,)

    @property
    def no_row(self) -> int | None:
        """An entry of an input that counts for no row, None where there is none."""
        return None

    @property
    def ignored(self) -> int | None:
        """An index of an input that gives the weight no gradient, None where there is none."""
        return None

    @property
    def overlap(self) -> float:
        """In how many rows an entry of the layer's input takes part; 1 for most kinds.

        The layer has at most √overlap times the spectral norm of its matrix.
        """
        return 1.0

    @abstractmethod
    def inputs(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """The rows `A` of the layer's input and their number `N`.

        Args:
            x: The layer's input, the batch first.
            bias: Whether the layer has a bias: appends a column of ones.
            kfac_approx: `"expand"`, every shared position is a row, or `"reduce"`, the mean over
                the shared positions is (arXiv 2311.00636).
            sample: Which rows to return; all if None.

        Returns:
            `A`, shape `(*groups, N, d_in [+ 1])`, of a sample fewer rows, and `N`.

        Raises:
            ValueError: If `kfac_approx` is unknown or `x` does not fit the layer.
        """

    def diagonal_rows(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """Rows, maybe fewer than `inputs` returns, whose `AᵀA` has the same diagonal.

        A diagonal K wants no more. Arguments and results are as for `inputs`; `N` is the same.
        """
        return self.inputs(x, bias=bias, kfac_approx=kfac_approx, sample=sample)

    @abstractmethod
    def outputs(
        self,
        g: Array,
        *,
        kfac_approx: str,
        loss_average: str | int | None,
        sample: Sample | None = None,
    ) -> tuple[Array, int]:
        """The rows `B` of the gradient of the layer's output and the number `M` of loss terms.

        Args:
            g: The gradient of the reduced loss with respect to the layer's output.
            kfac_approx: `"expand"`, every shared position is a row, or `"reduce"`, their sum is.
            loss_average: What the loss is a mean over: `"batch"`, `"batch+sequence"` (the batch and
                the shared positions), a number of terms, or `None` if it is a sum.
            sample: Which rows to return; all if None. `inputs` may return other rows.

        Returns:
            `B`, shape `(*groups, N, d_out)`, of a sample fewer rows, and `M`.

        Raises:
            ValueError: If `kfac_approx` or `loss_average` is unknown or `g` does not fit the layer.
        """

    @abstractmethod
    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The weight and bias, or their gradients, as the matrix `(*groups, d_out, d_in [+ 1])`.

        Both may have further leading axes in common, of a stack of equal layers.
        """

    @abstractmethod
    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The weight and bias (or None) of a matrix: the inverse of `matrix`, views if possible.

        `weight_shape` is the shape of one layer's weight, also where the matrix is a stack.
        """

    @abstractmethod
    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """The shape of the matrix as `(groups, d_out, d_in [+ 1])`, `groups` being a tuple."""

    def check_weight(self, weight_shape: Sequence[int], bias: bool) -> None:
        """Refuse a weight, and its bias if there is one, that is none of this kind.

        Raises:
            ValueError: Naming the kind and what it takes.
        """
        d_in = self.shape(weight_shape, bias)[-1]
        groups, d_out, alone = self.shape(weight_shape, False)
        if bias and self.has_rows and d_in == alone:
            raise ValueError(f"{self} has no bias: give the bias a name of its own")
        if prod((*groups, d_out, alone)) != prod(weight_shape):
            raise ValueError(
                f"{self} does not part a weight of shape {tuple(weight_shape)} into "
                f"{prod(groups)} equal matrices"
            )

    # ---- what a frontend may ask ----------------------------------------------------------------

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """The kind by which a call of another kind gives rows of this layer; None if it cannot.

        Both are handed the same weight. If only one of them `is_turned`, the rows change sides.
        """
        return None

    def of_transpose(self) -> LayerKind | None:
        """The kind of the same layer by the transpose of its weight; None if there is none."""
        return None

    def of_gradients(self) -> LayerKind | None:
        """The kind of the same matrix that learns from gradients alone, with the bias apart.

        None if there is none.
        """
        return None

    def with_average_groups(self) -> LayerKind:
        """The same kind with one factor K for all channel groups, if it has such."""
        return self

    def has_rows_along(self, axis: int) -> bool | None:
        """Whether an axis of the weight has rows of the matrix, or columns; None if neither.

        The rows of several matrices come one matrix after the other. What has whole rows, or whole
        columns, can be stepped by itself.
        """
        return None

    def positions(self, x: Array) -> Shape | None:
        """The shape of the positions of an input, each a row; None if none can be left out."""
        return None

    def unfolded(self, x: Array, g: Array) -> int | None:
        """How many positions a sample becomes whose rows are larger than it, so better in pieces.

        None if rows are no larger than the input, 0 without a batch axis.
        """
        return None

    def all_inputs(self, x: Array, *, bias: bool, like: Array) -> Array:
        """The rows `A` of all positions, one-hot ones in full, like an array: for checks."""
        return cast(self.inputs(x, bias=bias, kfac_approx="expand")[0], like)


class WithoutRows(LayerKind):
    """A kind whose rows are not made by it, if there are any."""

    def inputs(self, *args: Any, **keywords: Any) -> NoReturn:
        """Not to be asked for."""
        raise NotImplementedError(f"{type(self).__name__} makes no rows")

    outputs = inputs


def is_expand(kfac_approx: str) -> bool:
    """Whether the approximation is `"expand"` (else it is `"reduce"`)."""
    if kfac_approx not in ("expand", "reduce"):
        raise ValueError(f"kfac_approx = {kfac_approx!r}: choose 'expand' or 'reduce'")
    return kfac_approx == "expand"


def loss_terms(loss_average: str | int | None, batch: int, shared: Sequence[int]) -> int:
    """The number `M` of terms that the loss is a mean over (1 for a sum)."""
    if loss_average is None:
        return 1
    if loss_average == "batch":
        return batch
    if loss_average == "batch+sequence":
        return batch * prod(shared)
    terms = plain(loss_average)
    if type(terms) is int and terms > 0:
        return terms
    raise ValueError(
        f"loss_average = {loss_average!r}: choose 'batch', 'batch+sequence', the number of terms "
        "that the loss is a mean of, or None for a sum"
    )


def whole(what: str, value: Any, least: int) -> int:
    """A whole number, maybe one of NumPy.

    Raises:
        ValueError: If it is smaller than the least, or none. The message begins with `what`.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{what} must be at least {least} and whole")
    return found


def append_bias(matrix: Array, bias: Array | None) -> Array:
    """`matrix`, shape (..., d_out, d_in), with `bias`, shape (..., d_out), as its last column."""
    return matrix if bias is None else concat((matrix, bias[..., None]), axis=-1)


def two_axes(weight_shape: Sequence[int], kind: LayerKind) -> tuple[int, int]:
    """The shape of a weight with two axes.

    Raises:
        ValueError: If it has another number of axes.
    """
    if len(weight_shape) != 2:
        raise ValueError(
            f"{kind} has a weight of 2 axes, not of shape {tuple(weight_shape)}: give the kind of "
            "the layer in layers="
        )
    return weight_shape[0], weight_shape[1]
