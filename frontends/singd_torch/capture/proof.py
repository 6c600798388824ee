"""Whether the rows of a layer tell its gradient: other uses of its weight may not be seen."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from singd_core._array import widen
from singd_core.layers import LayerKind
from singd_torch._uncompiled import uncompiled
from singd_torch.capture.beside import Beside
from singd_torch.capture.columns import times, transposed_product, transposed_times
from singd_torch.capture.tap import backward_pass
from singd_torch.layers.layer import IN_THE_LOSS, Layer
from singd_torch.layers.rows import in_pieces
from singd_torch.layers.source import Source
from singd_torch.sharding import is_in_parts
from singd_torch.tensors.pieces import on_host

# Why rows do not tell the gradient.
NOT_SEEN = "used where no call is seen, or in the loss by itself"
# Why rows do not tell what is stepped along.
CLIPPED = (
    "clipped by value or by parts (clip_grad_norm_ of all parameters at once would keep its rows)"
)

# Of the gradient, beyond which its other part is no rounding.
_SHARE = 0.1
# Of a gradient, beyond which its bias is not scaled alike, or its largest entries were cut.
_APART = 0.2
# Columns along which a row can tell whether it was scaled.
_COLUMNS = 4
# Numbers that are compared, if the matrix has so many.
_NUMBERS = 64
# Backward passes of a step, such as of micro-batches, that are looked at.
_PASSES = 8


class Proof:
    """The rows of one backward pass beside the gradient G of the weight, along random directions.

    For a matrix V of a few columns of random signs, `Bᵀ (A V) = G V` costs next to nothing, where
    `Bᵀ A` costs as much as the gradient itself, and is as unlikely to hold by chance.
    A factor between the two is no fault, so that hooks may scale a gradient. But factors by rows
    make steps that lead uphill of a gradient that is clipped by value or apart from its bias.

    Attributes:
        layer: The layer.
    """

    def __init__(self, layer: Layer, leaf: Tensor) -> None:
        """Begin in the backward pass that runs, which tells the gradient of the weight at last.

        The `leaf` is the weight, or what was gathered from its parts, which is gone after the pass.
        """
        self.layer, self._leaf, self._pass = layer, leaf, backward_pass()
        self._V = _signs(layer, leaf.device)
        self._products: dict[int | None, Tensor] = {}
        self._terms: Tensor | float = 0.0
        self._eps = torch.finfo(layer.weight.dtype).eps
        self._gradient: Tensor | None = None
        self._of_decay: list[Tensor] = []
        self._handles: list[Any] = [leaf.register_hook(self)]  # type: ignore[no-untyped-call]
        self._of_bias: Tensor | None = None
        # else what the gradient becomes is not what the pass adds
        before = layer.weight.grad
        self._is_alone = (leaf is layer.weight and not is_in_parts(leaf)) and (
            before is None or (on_host(before) and not bool(before.any()))
        )
        bias = layer.bias if layer.has_bias_column and self._is_alone else None
        if bias is not None and bias.requires_grad:
            self._handles.append(bias.register_hook(self._see_bias))  # type: ignore[no-untyped-call]

    @uncompiled("a hook of backward passes")
    def __call__(self, gradient: Tensor) -> None:
        """What autograd calls with all that the pass adds to the gradient."""
        if self.is_of_this_pass():  # else it is one inside that
            self._handles[0].remove()
            matrix = self.layer.kind.matrix(_whole(gradient.detach()))
            self._gradient = widen(matrix @ self._V.to(matrix.dtype))
            if self._leaf is not self.layer.weight or is_in_parts(self._leaf):
                self._of_decay = self._decays()

    @uncompiled("a hook of backward passes")
    def _see_bias(self, gradient: Tensor) -> None:
        if self.is_of_this_pass():
            self._handles[1].remove()
            self._of_bias = widen(gradient.detach().clone())

    def is_of_this_pass(self) -> bool:
        """Whether the backward pass that runs is its own."""
        return backward_pass() == self._pass

    def end(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()

    def add(self, source: Source, x: Tensor, g: Tensor) -> None:
        """Add the rows of a call."""
        x, g = _whole(x), _whole(g)
        whole = source.kind.is_convolution  # its patches are not made
        pieces = (x,) if whole else in_pieces(self.layer, source.kind, x, g)
        samples = [len(piece) for piece in pieces]
        gradients = torch.split(g, samples) if len(pieces) > 1 else [g]
        for own, own_g in zip(pieces, gradients, strict=True):
            self._add(source.kind, source.part, source.swapped, own, own_g)

    def _add(self, kind: LayerKind, part: int | None, swapped: bool, x: Tensor, g: Tensor) -> None:
        B, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
        if swapped:
            right = B @ self._V.to(B)
            product, other = transposed_times(kind, x, right, len(self.layer.weight))
        else:
            right = times(kind, x, self._V)
            product, other = transposed_product(B, right.to(B)), B
        self._eps = max(self._eps, *(torch.finfo(t.dtype).eps for t in (right, other)))
        self._terms = self._terms + _norm(right) * _norm(other)
        self._products[part] = self._products.get(part, 0.0) + widen(product)

    @property
    def likeness(self) -> Hashable:
        """What proofs have in common that can be looked at as one; None if nothing is known."""
        G = self._gradient
        return None if G is None else (G.shape, G.dtype, G.device)

    @staticmethod
    def doubtful(proofs: Sequence[Proof]) -> Tensor:
        """Of which proofs, all alike, a tenth of the gradient is, beyond rounding, something else.

        It is on the device. NaN is no doubt.
        """
        G, P = (
            torch.stack([one for one in own if one is not None])
            for own in zip(*((one._gradient, one._product()) for one in proofs), strict=True)
        )
        tiny, axes = torch.finfo(G.dtype).tiny, tuple(range(1, G.ndim))
        # squares of tiny gradients leave the range
        size, of_P = (x.abs().amax(axes, keepdim=True).clamp(min=tiny) for x in (G, P))
        G, P = G / size, P / of_P
        along = (G * P).sum(axes, keepdim=True) / (P * P).sum(axes, keepdim=True).clamp(min=tiny)
        norm, rest = vector_norm(G, dim=axes), vector_norm(G - along * P, dim=axes)
        size = size.flatten()
        pairs = zip(proofs, (norm * size).unbind(), strict=True)
        rounding = torch.stack([one._rounding(own) for one, own in pairs])
        found: Tensor = rest > _SHARE * norm + rounding / size
        return found

    def fails(self) -> bool:
        """Whether the rest of a doubtful gradient is none of decay in the loss either.

        That is along the weight, or its signs. The weight is still what it was.
        """
        assert self._gradient is not None
        known = torch.stack([self._product(), *(self._of_decay or self._decays())])
        columns, G = (x.cpu().double() for x in (known.flatten(1).mT, self._gradient.flatten()))
        found = torch.linalg.lstsq(columns, G[:, None], driver="gelsd").solution
        norm = vector_norm(G)
        rest = vector_norm(G - (columns @ found)[:, 0])
        return bool(rest > _SHARE * norm + float(self._rounding(norm)))

    def changes(self) -> tuple[Tensor, Tensor] | None:
        """What the gradient has become since: whether it was cut by parts, or may have been.

        It was cut if its rows have been scaled by different numbers, or its bias by another one. It
        may have been if it was not scaled at all. Two booleans, 0-d on the device. None where there
        was a gradient before the pass, and where there is none now.
        """
        weight, G = self.layer.weight, self._gradient
        if not self._is_alone or G is None or weight.grad is None:
            return None
        matrix = self.layer.kind.matrix(weight.grad)
        now, tiny = widen(matrix @ self._V.to(matrix.dtype)), torch.finfo(G.dtype).tiny
        size = G.abs().amax().clamp(min=tiny)
        G = G / size  # squares of tiny gradients leave the range
        products, squares, most = (now * G).sum(-1), (G * G).sum(-1), _SHARE * _norm(now)
        c = products.sum() / squares.sum().clamp(min=tiny)
        other = _norm(now - c * G) > most  # not where one is NaN
        told = squares > 0.0  # a row of zeros tells no number
        of_rows = products / squares.clamp(min=tiny)
        by_rows = ~(_norm(now - of_rows[..., None] * G) > most)
        by_rows &= ((of_rows > 0.0) | ~told).all() & (G.shape[-1] >= _COLUMNS)
        cut, bias = other & by_rows, self.layer.bias
        if self._of_bias is not None and bias is not None and bias.grad is not None:
            expected = told.reshape(-1) * (c / size * self._of_bias)
            found = told.reshape(-1) * widen(bias.grad)
            sizes = torch.stack([_norm(expected), _norm(found)])
            apart = _norm(found - expected) > _APART * sizes.max()
            cut = cut | (~other & apart & (sizes > 0.0).all())  # else one of them rests
        return cut, other & ~by_rows

    def is_clipped_by_value(self) -> bool:
        """Whether many entries of a gradient that is there have the size of the largest one."""
        assert self.layer.weight.grad is not None
        sizes = self.layer.weight.grad.detach().abs()
        at_most = sizes == sizes.amax()
        share = float(_norm(sizes * at_most) / _norm(sizes).clamp(min=1e-300)) ** 2
        return int(at_most.sum()) > 2 and share > _APART  # two classes have pairs of equal ones

    def _decays(self) -> list[Tensor]:
        weight = self.layer.kind.matrix(_whole(self._leaf.detach()))
        V = self._V.to(weight.dtype)
        return [widen(weight @ V), widen(weight.sign() @ V)]

    def _rounding(self, norm: Tensor) -> Any:
        """How far both may be apart by rounding, also of what is below the smallest number."""
        dtype = self.layer.weight.dtype
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * self._V.numel() ** 0.5
        return 8 * self._eps * (self._terms + norm) + 8 * smallest

    def _product(self) -> Tensor:
        """Bᵀ A V of all calls."""
        assert self._gradient is not None
        found = self._products
        if None in found:
            return found[None]
        return torch.stack([found.get(i, 0.0 * own) for i, own in enumerate(self._gradient)])


class Proofs:
    """The proofs of all layers, from the passes of one step.

    Attributes:
        differentiated: The layers whose derivatives the loss of this step contains.
    """

    def __init__(self) -> None:
        self.differentiated: set[Layer] = set()
        self._of: dict[Layer, list[Proof]] = {}
        self._left_out: set[Layer] = set()

    def add(self, layer: Layer, source: Source, x: Tensor, g: Tensor, leaf: Tensor | None) -> None:
        """Add a call of the backward pass that runs, in which the `leaf` is the weight."""
        proofs = self._of.setdefault(layer, [])
        proof = next((one for one in proofs if one.is_of_this_pass()), None)
        if proof is None:
            if len(proofs) == _PASSES or layer in self._left_out:
                return
            if leaf is None or not _can_be_proved(layer, leaf):
                return
            proofs.append(proof := Proof(layer, leaf))
        if source.kept is None:
            proof.add(source, x, g)
        else:  # only some of the rows are there
            self.leave_out(layer)

    def leave_out(self, layer: Layer) -> None:
        """Ask for no proof of a layer in this step."""
        self._left_out.add(layer)

    def failed(self) -> list[tuple[Layer, str]]:
        """The layers whose rows do not tell the gradient, and why; nothing is kept for later steps.

        The host waits for an accelerator only where there are proofs.
        """
        alike: dict[Hashable, list[tuple[Layer, Proof]]] = {}
        for layer, proofs in self._of.items():
            for proof in proofs if layer not in self._left_out else ():
                if proof.likeness is not None:
                    alike.setdefault(proof.likeness, []).append((layer, proof))
        differentiated = self.differentiated
        self.forget()
        self.differentiated, self._left_out = set(), set()
        if not alike:
            return []
        each = [Proof.doubtful([proof for _, proof in own]) for own in alike.values()]
        found = torch.cat([own.to(each[0].device) for own in each]).tolist()
        return [
            (layer, IN_THE_LOSS if layer in differentiated else NOT_SEEN)
            for (layer, proof), doubtful in zip(chain(*alike.values()), found, strict=True)
            if doubtful and proof.fails()
        ]

    def clipped(self) -> list[Layer]:
        """The layers whose gradients have been clipped by parts between a pass and the step.

        The host waits for an accelerator only where there are proofs.
        """
        alone = [
            own[0]
            for layer, own in self._of.items()
            if len(own) == 1 and layer not in self._left_out
        ]
        known = [(proof, proof.changes()) for proof in alone]
        asked = [(proof, *found) for proof, found in known if found is not None]
        if not asked:
            return []
        device = asked[0][1].device
        told = torch.stack([torch.stack(found).to(device) for _, *found in asked]).tolist()
        return [
            proof.layer
            for (proof, *_), (cut, may_be) in zip(asked, told, strict=True)
            if cut or (may_be and proof.is_clipped_by_value())
        ]

    def forget_earlier(self, layer: Layer) -> None:
        """Drop what is known of a layer from passes before the one that runs."""
        for proof in self._of.get(layer, [])[:]:
            if not proof.is_of_this_pass():
                proof.end()
                self._of[layer].remove(proof)

    def forget(self) -> None:
        """Drop all, as of gradients that are dropped."""
        for proof in (one for proofs in self._of.values() for one in proofs):
            proof.end()
        self._of = {}


def _can_be_proved(layer: Layer, leaf: Tensor) -> bool:
    """Whether autograd tells the gradient of a weight, and rows are those that it is made of."""
    hooks = (leaf._backward_hooks or {}).values()
    changed = any(not isinstance(hook, (Proof, Beside)) for hook in hooks)
    return not (changed or leaf.is_meta or layer.group["average_groups"])


def _signs(layer: Layer, device: torch.device) -> Tensor:
    """V, shape (d_in, k), of a size that no sum in float16 leaves its range; always the same."""
    _, d_out, d_in = layer.kind.shape(tuple(layer.weight.shape), False)
    return _drawn(min(d_in, max(4, -(-_NUMBERS // d_out))), d_in, device)


@functools.lru_cache(maxsize=16)
def _drawn(k: int, d_in: int, device: torch.device) -> Tensor:
    if k == d_in:  # signs may be alike
        return torch.eye(d_in, device=device)
    draw = torch.Generator(device).manual_seed(0)
    signs = torch.randint(2, (k, d_in), device=device, generator=draw)
    return ((2.0 * signs - 1.0) * 2.0 ** -(d_in.bit_length() // 2)).mT


def _whole(t: Tensor) -> Tensor:
    """What tensor parallelism has in parts, which all processes ask for at once."""
    return t.full_tensor() if is_in_parts(t) else t


def _norm(x: Tensor) -> Tensor:
    size: Tensor = vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return size
