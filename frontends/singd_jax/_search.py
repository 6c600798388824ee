"""Which parameters form layers, decided from what was seen of them in a loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from singd_jax._axes import Key, Region, merged
from singd_jax._calls import EMBEDDING, Call
from singd_jax._layer import TRANSPOSED, Layer
from singd_jax._loss import Leaves, is_followed
from singd_jax._part import Part
from singd_jax._product import Bias, Noted, Path
from singd_jax._reasons import COMPLEX, NUMBER, OF_ONE_USE, VECTORS


class Search:
    """Decides, from what a tracer saw, which parameters form layers."""

    def __init__(self, noted: Noted, leaves: Leaves) -> None:
        self.noted, self.leaves = noted, leaves
        self.layers: dict[str, Layer] = {}
        self.reasons: dict[str, str] = {}

    def run(self, kfac_approx: str, loss_average: Any) -> None:
        calls = sorted(self.noted.calls.items())
        found = [self._layer(key, own, kfac_approx, loss_average) for key, own in calls]
        candidates = self._without_shared_biases([layer for layer in found if layer is not None])
        while True:  # a bias that is let go may leave another leaf uncovered
            kept = self._covered(candidates)
            if kept == candidates:
                break
            candidates = kept
        self.layers = {layer.name: self._with_other_reads(layer) for layer in candidates}
        for name, layer in self.layers.items():
            if layer.transposed and name + TRANSPOSED in self.layers:
                raise ValueError(
                    f"{name + TRANSPOSED!r} is the name of a parameter, and of the transposed use "
                    f"of {name!r} in the curvature: rename one of them"
                )

    def others(self) -> dict[str, str]:
        """Why the remaining parameters belong to no layer."""
        owned = {name for layer in self.layers.values() for name in layer.leaves}
        biases = {
            bias.view.leaf: self.leaves.names[leaf]
            for (leaf, _), found in self.noted.biases.items()
            for bias in found.values()
        }
        others = {}
        for i, name in enumerate(self.leaves.names):
            if name not in owned:
                reason = self.reasons.get(name) or "; ".join(self.noted.reads.get(i, ()))
                if not reason and i in biases:
                    weight = biases[i]
                    how = " where it is transposed" if weight in owned else ", which forms no layer"
                    reason = f"the bias of {weight}{how}"
                if not is_followed(self.leaves.arrays[i]):
                    reason = COMPLEX if self.leaves.arrays[i].size else "has no entries"
                reason = reason or "no gradient of the loss reaches it"
                others[name] = VECTORS + reason if i in self.noted.vectors else reason
        return others | dict.fromkeys(self.leaves.numbers, NUMBER)

    def _layer(
        self, key: Key, calls: dict[Path, Call], kfac_approx: str, loss_average: Any
    ) -> Layer | None:
        """The layer of a region of a leaf, or None with a reason."""
        leaf, region = key
        name = self.leaves.names[leaf]
        embeddings = [call for call in calls.values() if call.kind == EMBEDDING]
        main = next((c for c in calls.values() if c.kind != EMBEDDING), *embeddings[:1])
        uses = {path: call for path, call in calls.items() if call.layout == main.layout}
        rest = [call for path, call in calls.items() if path not in uses]
        if any(call.layout != main.transposed for call in rest):
            self.reasons[name] = "used as two different matrices"
            return None
        weight = self._part(leaf, main.view, main.stack, main.outs, main.ins)
        if weight.numbers != math.prod(n for _, n in region):
            self.reasons[name] = "used as a matrix only in part"
            return None
        notes, diagonal = [], ""
        if embeddings:
            diagonal = "K" if embeddings[0].layout == main.layout else "C"
        if kfac_approx == "reduce" and not all(call.reduces for call in calls.values()):
            notes.append('no axis of the batch: rows as in "expand"')
        if kfac_approx == "reduce" and any(call.guesses for call in calls.values()):
            notes.append("several axes are as long as the batch: the first was taken for it")
        if kfac_approx == "reduce" and key in self.noted.steps:
            notes.append("the steps of a scan are not averaged over")
        if loss_average == "batch+sequence" and max(len(uses), len(rest)) > 1:
            notes.append(OF_ONE_USE)
        kind = main.kind if len(uses) == 1 else f"{main.kind}, {len(uses)} uses"
        if embeddings and main.kind != EMBEDDING:
            kind += " and embedding"
        elif rest:
            kind += " and transposed"
        own = "" if weight.whole else _region(weight)
        return Layer(
            name + own,
            kind,
            weight,
            self._bias(key, uses),
            len(uses),
            len(rest),
            diagonal,
            notes=tuple(notes),
            overlap=max(call.overlap for call in calls.values()),
            in_turn=main.in_turn,
            rows=sum(call.rows * call.times for call in calls.values()),
            runs=sum(call.times for call in calls.values()),
        )

    def _bias(self, key: Key, uses: dict[Path, Call]) -> Part | None:
        """The bias that every use has."""
        found = [self.noted.biases[key].get(path) for path in uses]
        parts = {None if bias is None else self._bias_part(bias) for bias in found}
        if len(parts) == 1:
            return parts.pop()
        for part in parts:
            if part is not None:
                self.reasons[part.name] = "added to some uses of a weight and not to others"
        return None

    def _bias_part(self, bias: Bias) -> Part:
        return self._part(bias.view.leaf, bias.view, bias.stack, bias.outs, ())

    def _part(self, leaf: int, view: Any, stack: Any, outs: Any, ins: Any) -> Part:
        return Part(
            self.leaves.names[leaf],
            tuple(self.leaves.arrays[leaf].shape),
            view.region,
            view.flips,
            tuple(stack),
            merged(outs),
            merged(ins),
        )

    def _with_other_reads(self, layer: Layer) -> Layer:
        indices = [self.leaves.names.index(name) for name in layer.leaves]
        reads = {reason: None for i in indices for reason in self.noted.reads.get(i, ())}
        return dataclasses.replace(layer, elsewhere=tuple(reads))

    def _without_shared_biases(self, layers: list[Layer]) -> list[Layer]:
        """Without the biases that more is added to than the uses of their layer."""
        kept = []
        for layer in layers:
            if layer.bias is not None and self._additions(layer.bias) > layer.uses:
                self.reasons[layer.bias.name] = "the bias of several matrices"
                layer = layer.without_bias()
            kept.append(layer)
        return kept

    def _additions(self, part: Part) -> int:
        """To how many products a bias, or some of it, is added: of layers or of none."""
        leaf = self.leaves.names.index(part.name)
        return sum(_meet(region, part.region) for region in self._added(leaf))

    def _added(self, leaf: int) -> list[Region]:
        """Which regions of a leaf are added to products, once for each."""
        biases = (b for found in self.noted.biases.values() for b in found.values())
        return [b.view.region for b in biases if b.view.leaf == leaf]

    def _covered(self, layers: list[Layer]) -> list[Layer]:
        """Without the layers and biases that do not account for all of their leaf's gradient."""
        of_leaf: dict[str, list[Part]] = {}
        for layer in layers:
            for part in layer.parts:
                of_leaf.setdefault(part.name, []).append(part)
        accounted = {name: self._accounts(name, parts) for name, parts in of_leaf.items()}
        kept = []
        for layer in layers:
            if not accounted[layer.weight.name]:
                self.reasons[layer.weight.name] = "used in parts that overlap or leave some out"
                continue
            if layer.bias is not None and not accounted[layer.bias.name]:
                self.reasons[layer.bias.name] = "a bias only in part"
                layer = layer.without_bias()
            kept.append(layer)
        return kept

    def _accounts(self, name: str, parts: Sequence[Part]) -> bool:
        """Whether parts of a leaf do not overlap, and whether nothing reads what they leave out."""
        leaf = self.leaves.names.index(name)
        if any(_meet(a.region, b.region) for a, b in itertools.combinations(parts, 2)):
            return False
        if sum(part.numbers for part in parts) == math.prod(self.leaves.arrays[leaf].shape):
            return True
        used = {region for i, region in self.noted.calls if i == leaf} | {*self._added(leaf)}
        return used == {part.region for part in parts} and not self.noted.reads.get(leaf)


def _meet(a: Region, b: Region) -> bool:
    """Whether two regions of a leaf have entries in common."""
    return all(i < j + m and j < i + n for (i, n), (j, m) in zip(a, b, strict=True))


def _region(part: Part) -> str:
    def along(axis: int, start: int, n: int) -> str:
        whole = part.shape[axis]
        return ":" if n == whole else str(start) if n == 1 else f"{start}:{start + n}"

    return f"[{','.join(along(i, *span) for i, span in enumerate(part.region))}]"
