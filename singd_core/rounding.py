"""Rounding to 16 bits that loses nothing on average.

A weight in bfloat16 has 8 bits. A step that is shorter than half of its last one vanishes when it
is rounded to the nearest number, and so does each that follows. Stochastic rounding takes the two
numbers around x with probabilities that make their mean x. A compensated sum keeps what was lost.

The random bits are a function of the seed, the step, the name of an array and the position of an
entry, in 32-bit integers. So they are the same in every library and on every device, however arrays
are stacked or parted. Nothing is kept between steps, and processes that hold copies agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from singd_core._array import Array, Scalar, cast, device, namespace, widen
from singd_core._tree import Tree

T_Tree = TypeVar("T_Tree", bound=Tree)

ROUNDINGS = ("stochastic", "nearest", "kahan")


class Format(NamedTuple):
    """A dtype of 16 bits.

    Attributes:
        fewer: The bits of float32 that it has not.
        largest: Its largest number.
        normal: The smallest number that has all of its bits, None if it is the same as in float32.
    """

    fewer: int
    largest: float
    normal: float | None


_FORMATS = {
    "bfloat16": Format(16, (2.0 - 2.0**-7) * 2.0**127, None),
    "float16": Format(13, 65504.0, 2.0**-14),
}

# The integer hash lowbias32 (C. Wellons, "Prospecting for Hash Functions", 2018), its constants as
# signed numbers: not every library multiplies unsigned ones.
_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97 - (1 << 32)


class Place(NamedTuple):
    """Where an array stands in the whole one, in numbers of the latter.

    Attributes:
        start: The position of its first entry.
        strides: How far apart entries are along each axis, None if the array is contiguous there.
    """

    start: int = 0
    strides: Sequence[int] | None = None

    @classmethod
    def of(cls, whole: Sequence[int], offset: Sequence[int]) -> Self:
        """The place of a part with these indices of its first entry."""
        strides = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
        start = sum(n * stride for n, stride in zip(offset, strides, strict=False))
        return cls(start, strides)


WHOLE = Place()


class Rounding(NamedTuple):
    """How the arrays of one layer, or of a stack of equal ones, are stored after a step.

    Attributes:
        base: What is made of the seed and the step, a number or 0-d.
        owner: What `identity` makes of the name of the layer; of a stack the numbers of its layers,
            shape (n,).
        dtypes: The dtype in which each array is kept, by its name.
    """

    base: Scalar
    owner: Scalar
    dtypes: Mapping[str, Any]

    @classmethod
    def of(
        cls, mode: str, seed: int, step: Scalar, owner: str | Scalar, dtypes: Mapping[str, Any]
    ) -> Self | None:
        """The rounding of a step; None if all is rounded to the nearest number or has 32 bits.

        Args:
            mode: One of `ROUNDINGS`.
            seed: Of the random bits.
            step: The number of steps taken, a number or 0-d int32.
            owner: The name of the layer, or as the attribute.
            dtypes: As the attribute.
        """
        if not is_rounded(mode, dtypes.values()):
            return None
        return cls.at(seed, step, identity(owner) if isinstance(owner, str) else owner, dtypes)

    @classmethod
    def at(cls, seed: int, step: Scalar, owner: Scalar, dtypes: Mapping[str, Any]) -> Self:
        """The same, whatever the dtypes."""
        return cls(hashed(hashed(_wrapped(seed)) ^ step), owner, dtypes)

    def rounds(self, name: str) -> bool:
        """Whether an array of this name is stored in 16 bits."""
        return format_of(self.dtypes[name]) is not None

    def __call__(self, x: Array, name: str, part: str = "", place: Place = WHOLE) -> Array:
        """`x` in float32, with numbers that the dtype of `name` has, stochastically rounded.

        What the dtype has stays as it is, and so do NaN and infinite numbers. Numbers beyond its
        largest are left to the cast, which makes those infinite that are half a unit beyond.

        Args:
            x: The array, the axis of a stack first.
            name: The name of the array, or of the structured matrix whose array it is.
            part: The name of the array within that matrix.
            place: Where x stands in that array.
        """
        known = format_of(self.dtypes[name])
        if known is None:
            return x
        x = widen(x)
        return stochastic(x, random_bits(self.key(name, part), x, place), known)

    def tree(self, new: T_Tree, name: str) -> T_Tree:
        """A structured matrix, its arrays rounded."""
        return new.rebuild(self(a, name, part) for part, a in new.named_arrays())

    def stored(
        self, x: Array, name: str, place: Place = WHOLE, cost: Array | None = None
    ) -> tuple[Array, Array | None]:
        """`x` in float32 rounded, and what rounding has cost, if that is kept.

        Args:
            x: The array.
            name: Its name.
            place: Where it stands in the whole one.
            cost: What rounding has cost before, which is added to x; None unless it is kept.
        """
        if cost is None:
            return self(x, name, place=place), None
        x, known = x + widen(cost), format_of(self.dtypes[name])
        assert known is not None
        new = nearest(x, known)
        return new, cast(x - new, cost)

    def key(self, name: str, part: str = "") -> Scalar:
        """What the random bits of an array depend on beside the positions of its entries."""
        return hashed(self.owner ^ hashed(self.base ^ identity(f"{name}.{part}")))


def is_rounded(mode: str, dtypes: Iterable[Any]) -> bool:
    """Whether any of the arrays of these dtypes is rounded to other than the nearest number."""
    return mode != "nearest" and any(map(format_of, dtypes))


def format_of(dtype: Any) -> Format | None:
    """What is known of a dtype of 16 bits, None of any other."""
    return _FORMATS.get(str(dtype).rpartition(".")[2])


def identity(name: str) -> int:
    """A number made of a name (FNV-1a), the same in every process, unlike `hash`."""
    found = 0x811C9DC5
    for byte in name.encode():  # torch.compile cannot trace zlib.crc32
        found = (found ^ byte) * 0x01000193 % (1 << 32)
    number: int = _wrapped(found)
    return number


def hashed(x: Scalar) -> Scalar:
    """A permutation of the 32-bit integers that leaves no pattern: of a number, or of int32."""
    x = _wrapped((x ^ ((x >> 16) & 0xFFFF)) * _FIRST)
    x = _wrapped((x ^ ((x >> 15) & 0x1FFFF)) * _SECOND)
    return x ^ ((x >> 15) & 0x1FFFF)


def random_bits(key: Scalar, like: Array, place: Place = WHOLE) -> Array:
    """16 random bits for each entry of `like`, as int32.

    Args:
        key: A number, 0-d, or for a stack of the shape of its first axes.
        like: It tells the shape and the device.
        place: Where the entries stand in the whole array.
    """
    axes = 0 if isinstance(key, int) else key.ndim
    if axes:
        key = namespace(key).reshape(key, (*key.shape, *(1,) * (like.ndim - axes)))
    bits = bits_at(_positions(like, axes, place), key)
    return bits if like.ndim else namespace(like).reshape(bits, ())


def bits_at(positions: Array, key: Scalar) -> Array:
    """16 random bits for each position, as int32; keys broadcast."""
    bits = positions ^ key
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _FIRST
    bits += key  # else the bits of every array were a part of one sequence
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _SECOND
    bits >>= 16
    bits &= 0xFFFF
    return bits


def stochastic(x: Array, bits: Array, known: Format) -> Array:
    """`x` in float32 with numbers that a dtype of 16 bits has, by 16 random bits for each.

    Of the bits of |x|, those that the dtype has not are added to as many random ones: the carry,
    which rounds up, has the probability that makes the mean x.
    """
    return _carried(x, lambda whole: bits & ((1 << known.fewer) - 1), known)


def nearest(x: Array, known: Format) -> Array:
    """`x` in float32 with the nearest numbers that a dtype of 16 bits has.

    Not by a cast and a cast back: compilers for accelerators leave both out, XLA's and torch's.
    """
    half = (1 << (known.fewer - 1)) - 1
    return _carried(x, lambda whole: half + ((whole >> known.fewer) & 1), known)


def _carried(x: Array, added: Callable[[Array], Array], known: Format) -> Array:
    """`x` without the bits that a dtype has not, after what is `added` to its bits."""
    xp, shift, lost = namespace(x), None, (1 << known.fewer) - 1
    y = x
    if known.normal is not None:  # smaller numbers are spaced as those from there to the double
        size = xp.astype(abs(x) < known.normal, x.dtype) * known.normal
        shift = xp.where(x < 0.0, -size, size)
        y = x + shift
    whole = y.view(xp.int32)
    whole = whole + added(whole)
    whole &= ~lost
    y = whole.view(xp.float32)
    if shift is not None:
        y = y - shift
    return xp.where(abs(x) <= known.largest, y, x)


def _positions(like: Array, axes: int, place: Place) -> Array:
    """The position of each entry of `like` in the whole array, but for its first `axes`."""
    xp, shape, ndim = namespace(like), like.shape[axes:], max(1, like.ndim)
    strides = place.strides or Place.of(shape, ()).strides or ()
    # never 0-d: NumPy would make numbers of it, and warn of what leaves their range
    found = xp.full((1,) * ndim, _wrapped(place.start), dtype=xp.int32, device=device(like))
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True), axes):
        along = xp.arange(n, dtype=xp.int32, device=device(like)) * _wrapped(stride)
        found = found + xp.reshape(along, (n, *(1,) * (ndim - axis - 1)))
    return found


def _wrapped(x: Scalar) -> Scalar:
    """A number as its last 32 bits, signed; arrays of int32 have no others."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31) if isinstance(x, int) else x
