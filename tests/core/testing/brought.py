"""Structures as a person may bring them: valid ones that are unlike ours."""

from typing import Any

from array_api_compat import array_namespace, device

from singd_core.structures import Structure, family, structure


@structure
class Classes(Structure):
    """Entry (i, j) where i = j modulo p: an equivalence, and so closed under products.

    Attributes:
        blocks: A dense block for each of the p classes, shape (..., p, d / p, d / p).
    """

    blocks: Any

    @classmethod
    def modulus(cls, d: int) -> int:
        raise NotImplementedError

    @classmethod
    def restrict(cls, M: Any) -> Any:
        xp, d = array_namespace(M), M.shape[-1]
        p = cls.modulus(d)
        T = xp.reshape(M, (*M.shape[:-2], d // p, p, d // p, p))
        return cls(xp.stack([T[..., :, i, :, i] for i in range(p)], axis=-3))

    def dense(self) -> Any:
        xp, (p, q) = array_namespace(self.blocks), self.blocks.shape[-3:-1]
        n = self.blocks.ndim - 3
        eye = xp.eye(p, dtype=self.blocks.dtype, device=device(self.blocks))
        T = self.blocks[..., None] * eye[:, None, None, :]
        T = xp.permute_dims(T, (*range(n), n + 1, n, n + 2, n + 3))
        return xp.reshape(T, (*self.blocks.shape[:-3], p * q, p * q))


@structure
class Divisors(Classes):
    """p is the largest divisor of d up to its root: the pattern jumps from one side to the next."""

    blocks: Any

    @classmethod
    def modulus(cls, d: int) -> int:
        return max(k for k in range(1, d + 1) if d % k == 0 and k * k <= d)


class Modulo(Classes):
    """p is given, and only its multiples are sides."""

    p: int

    @classmethod
    def modulus(cls, d: int) -> int:
        return cls.p

    @classmethod
    def has_side(cls, d: int) -> bool:
        return d % cls.p == 0


def modulo(p: int = 2) -> type[Modulo]:
    return family(modulo, (p,), Modulo, p=p)


def no_structure(p: int) -> int:
    return p
