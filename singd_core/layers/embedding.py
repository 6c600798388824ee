"""The rows of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from singd_core._array import Array, device, namespace
from singd_core.layers._sampling import Sample
from singd_core.layers.base import LayerKind, Shape, two_axes, whole
from singd_core.layers.linear import Linear


@dataclass(frozen=True)
class Embedding(LayerKind):
    """A look-up in a table `(entries, d_out)`: a linear map of one-hot rows, `d_in = entries`.

    U is the diagonal of the entries' frequencies, so the factor K has to be diagonal. Expand is the
    only approximation for positions of a sequence: `"reduce"` would average one-hot rows to rows
    that are not one-hot.

    An index that is negative, or larger than the last entry, counts for no entry: to find it, the
    host would have to wait. `singd_core.check` finds it.

    Attributes:
        entries: The number of entries of the table.
        padding_idx: An entry that gets no gradient, or None. A negative number is as None.

    Raises:
        ValueError: If `entries` is no whole number.
    """

    entries: int
    padding_idx: int | None = None

    diagonal_inputs = True
    is_plain = True
    stacks = False

    def __post_init__(self) -> None:
        found = whole(f"entries = {self.entries!r}:", self.entries, 0)
        object.__setattr__(self, "entries", found)

    def inputs(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """One row of the roots of the entries' counts: its square has the diagonal of `AᵀA`.

        Args:
            x: Indices, shape `(batch, *shared)`, of an integer dtype.
            bias: Must be False: a table has none.
            kfac_approx: Ignored, see the class.
            sample: Ignored: few numbers are read, and rare entries would be missed.

        Returns:
            `A`, shape `(1, entries)`, in float32, and the number `N` of indices.

        Raises:
            ValueError: If `x` is of another dtype, such as one-hot rows.
        """
        # Sorting counts without a scatter, which the standard lacks, and without a host sync.
        xp, N = namespace(x), prod(x.shape)
        if not xp.isdtype(x.dtype, "integral"):
            raise ValueError(f"input x is of {x.dtype}: an embedding takes indices, of integers")
        if xp.iinfo(x.dtype).max <= self.entries:  # such as bytes for 256 entries
            x = xp.astype(x, xp.int32)
        entries = xp.arange(self.entries + 1, dtype=x.dtype, device=device(x))
        found = xp.searchsorted(xp.sort(xp.reshape(x, (N,))), entries)
        counts = xp.astype(found[1:] - found[:-1], xp.float32)
        if self.padding_idx is not None:
            counts = xp.where(entries[:-1] == self.padding_idx, xp.zeros_like(counts), counts)
        return xp.sqrt(counts)[None, :], N

    def outputs(
        self,
        g: Array,
        *,
        kfac_approx: str,
        loss_average: str | int | None,
        sample: Sample | None = None,
    ) -> tuple[Array, int]:
        """The rows `B`, shape `(N, d_out)`, of the gradient `(batch, *shared, d_out)`; and `M`."""
        return Linear().outputs(g, kfac_approx="expand", loss_average=loss_average, sample=sample)

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The table turned, `(d_out, entries)`."""
        return weight.mT

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The table, a view."""
        return matrix.mT, None

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`((), d_out, entries)`."""
        entries, d_out = two_axes(weight_shape, self)
        return (), d_out, entries

    def check_weight(self, weight_shape: Sequence[int], bias: bool) -> None:
        """Refuse also a table of other entries, or one that the padding is none of."""
        super().check_weight(weight_shape, bias)
        if weight_shape[0] != self.entries:
            raise ValueError(f"{self} has no table of shape {tuple(weight_shape)}: check entries")
        if self.padding_idx is not None and self.padding_idx >= self.entries:
            raise ValueError(
                f"{self} has no such padding: give an entry from 0 to {self.entries - 1}, or None"
            )

    @property
    def is_turned(self) -> bool:
        """A table has a row for each input."""
        return True

    @property
    def no_row(self) -> int | None:
        """Beyond the last entry nothing is counted."""
        return self.entries

    @property
    def ignored(self) -> int | None:
        """The padding."""
        return self.padding_idx

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """A look-up, or a linear map by the table."""
        return Linear().of_call(kind)

    def has_rows_along(self, axis: int) -> bool | None:
        """The entries, along the first axis, are columns."""
        return axis == 1

    def positions(self, x: Array) -> Shape | None:
        """All axes of the indices."""
        return tuple(x.shape)

    def all_inputs(self, x: Array, *, bias: bool, like: Array) -> Array:
        """The one-hot rows, shape `(N, entries)`."""
        entries = namespace(x).arange(self.entries, dtype=x.dtype, device=device(x))
        seen = namespace(x).reshape(x, (prod(x.shape), 1)) == entries
        if self.padding_idx is not None:
            seen = seen & (entries != self.padding_idx)
        return namespace(like).astype(seen, like.dtype)
