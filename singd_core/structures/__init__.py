"""The structures, their registry of names, and the base class of new ones."""

from singd_core.structures.base import Structure, structure
from singd_core.structures.blockdiagonal import BlockDiagonal, blockdiagonal
from singd_core.structures.blocktriangular import (
    BlockTriangular,
    hierarchical,
    trilbottomrightdiag,
    triltopleftdiag,
    triubottomrightdiag,
    triutopleftdiag,
)
from singd_core.structures.dense import Dense, Tril, Triu
from singd_core.structures.diagonal import Diagonal
from singd_core.structures.families import family
from singd_core.structures.pattern import Pattern
from singd_core.structures.registry import get, names, register
from singd_core.structures.toeplitz import TrilToeplitz, TriuToeplitz

__all__ = [
    "BlockDiagonal",
    "BlockTriangular",
    "Dense",
    "Diagonal",
    "Pattern",
    "Structure",
    "Tril",
    "TrilToeplitz",
    "Triu",
    "TriuToeplitz",
    "blockdiagonal",
    "family",
    "get",
    "hierarchical",
    "names",
    "register",
    "structure",
    "trilbottomrightdiag",
    "triltopleftdiag",
    "triubottomrightdiag",
    "triutopleftdiag",
]
