"""The optimizers that the benchmarks compare, each built for a model with a rate and a period T."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from singd_core import settings
from singd_core._settings import is_due
from singd_torch import SINGD

Optimizer = torch.optim.Optimizer


class Together(Optimizer):
    """Several optimizers of one model that step in turn."""

    def __init__(self, *parts: Optimizer) -> None:
        self._parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups  # the parts' own: a schedule reaches them

    def step(self, closure: None = None) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)


class Muon(Together):
    """torch.optim.Muon for the layers' weights, kernels as matrices, and AdamW for the rest.

    The rest has the weights that are embeddings too.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        self._weights = [m.weight for m in layers if m.weight not in tables]
        self._matrices = [nn.Parameter(w.detach().flatten(1)) for w in self._weights]  # same memory
        # matched to AdamW's step sizes, so that one rate serves both
        muon = torch.optim.Muon(self._matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        super().__init__(muon, *_adamw_for_rest(model, self._weights, lr))

    def step(self, closure: None = None) -> None:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


def _adamw_for_rest(model: nn.Module, owned: list[nn.Parameter], lr: float) -> list[Optimizer]:
    taken = set(owned)
    rest = [p for p in model.parameters() if p not in taken]
    return [torch.optim.AdamW(rest, lr=lr)] if rest else []


# ---- the builders: of a model, a rate, T, and what the loss is a mean of ------------------------


def _sgd(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _adamw(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def _fused_adamw(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def _adafactor(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=lr)


def _muon(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return Muon(model, lr)


def _singd(
    structure: str | None, model: nn.Module, lr: float, T: int, loss_average: str, **given: Any
) -> Optimizer:
    both = None if structure is None else (structure, structure)
    given = {"growing_T": False} | given
    return SINGD(model, lr=lr, T=T, structures=both, loss_average=loss_average, **given)


def _default(
    model: nn.Module,
    lr: float,
    T: int,
    loss_average: str,
    structures: str | None = None,
    **given: Any,
) -> Optimizer:
    """SINGD as it is, whose gaps grow to 50; with another T it has that gap from the start."""
    growing = settings().T == T
    return _singd(structures, model, lr, T, loss_average, growing_T=growing, **given)


def _without_rows(
    model: nn.Module, lr: float, T: int, loss_average: str, structures: str | None = None
) -> Optimizer:
    """SINGD of the parameters alone, as it is; the mean of the loss is not asked for."""
    growing = settings().T == T
    how = {"structures": structures, "lr": lr, "T": T, "growing_T": growing}
    return SINGD(model.named_parameters(), **how)


def _authors_singd(
    structure: str, model: nn.Module, lr: float, T: int, loss_average: str
) -> Optimizer:
    from singd.optim.optimizer import SINGD as AuthorsSINGD  # noqa: N811

    both = (structure, structure)
    singd = AuthorsSINGD(
        model, lr=lr, T=T, structures=both, loss_average=loss_average, warn_unsupported=False
    )
    owned = [p for group in singd.param_groups for p in group["params"]]
    return Together(singd, *_adamw_for_rest(model, owned, 1e-3))  # it trains no other parameters


def _heavyball() -> Any:
    import heavyball

    # None is eager; the decorated functions look when they are called
    heavyball.utils.compile_mode = heavyball.utils.compile_mode_recommended_to_none = None
    return heavyball


def _heavyball_soap(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    return _heavyball().SOAP(model.parameters(), lr=lr, precondition_frequency=T)


def _heavyball_psgd(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    def probability(step: int) -> float:  # steps are counted from 1
        return float((step - 1) % T == 0)

    return _heavyball().PSGDKron(
        model.parameters(), lr=lr, preconditioner_update_probability=probability
    )


def _collected_soap(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, precondition_frequency=T)


def _collected_psgd(model: nn.Module, lr: float, T: int, loss_average: str) -> Optimizer:
    from pytorch_optimizer import Kron

    def probability(step: int) -> float:  # steps are counted from 0
        return float(step % T == 0)

    return Kron(model.parameters(), lr=lr, pre_conditioner_update_probability=probability)


# ---- the list -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """An optimizer to compare.

    Attributes:
        build: Builds it of a model, a rate, T, and what the loss is a mean of.
        rates: The grid of a race.
        refreshes: Whether it refreshes something every T steps.
        periods: The T to race with.
        measured: The T to measure, those to race with if there are none.
        share: Which share of the steps refresh, None for one in T.
        late: Whether that is in the last of T steps, and not in the first.
        devices: The types of devices that it is measured on.
        extra: The extra of pyproject.toml that brings its package; empty for torch's own and ours.
        package: The module that has to be there.
    """

    build: Callable[[nn.Module, float, int, str], Optimizer]
    rates: tuple[float, ...]
    refreshes: bool = True
    periods: tuple[int, ...] = (1, 10)
    measured: tuple[int, ...] = ()
    share: float | None = None
    late: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    extra: str = ""
    package: str = "torch"

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    def __post_init__(self) -> None:
        if not self.refreshes:
            object.__setattr__(self, "periods", (1,))

    def share_of(self, T: int) -> float:
        """Which share of the steps refresh."""
        return 1.0 / T if self.share is None else self.share

    def is_refresh(self, step: int, T: int) -> bool:
        """Whether a step, counted from 0, is one of those that refresh."""
        return self.refreshes and (step + self.late) % T == 0


# Of the first 1000 steps of SINGD as it is, the share that refreshes.
_SHARE = sum(is_due(step, settings()) for step in range(1000)) / 1000

_ADAM_RATES = (0.003, 0.01, 0.03, 0.1)
_as_it_is = partial(
    Entry, rates=(settings().lr,), periods=(settings().T,), measured=(10,), share=_SHARE
)
_ours = partial(Entry, rates=(0.03, 0.06, 0.12, 0.24))
_authors = partial(Entry, rates=(0.01, 0.03, 0.1, 0.3), extra="peer-singd", package="singd")
_heavy = partial(Entry, rates=_ADAM_RATES, extra="peer-heavyball", package="heavyball")
_collected = partial(
    Entry, rates=_ADAM_RATES, extra="peer-pytorch-optimizer", package="pytorch_optimizer"
)

ENTRIES: dict[str, Entry] = {
    "SGD": Entry(build=_sgd, rates=(0.03, 0.1, 0.3, 1.0), refreshes=False),
    "AdamW": Entry(build=_adamw, rates=_ADAM_RATES, refreshes=False),
    "AdamW/fused": Entry(build=_fused_adamw, rates=_ADAM_RATES, refreshes=False, devices=("cuda",)),
    "Adafactor": Entry(build=_adafactor, rates=_ADAM_RATES, refreshes=False),
    "Muon": Entry(build=_muon, rates=(0.01, 0.03, 0.1, 0.3), refreshes=False),
    "SINGD/default": _as_it_is(build=_default),
    "SINGD/default, diagonal": _as_it_is(build=partial(_default, structures="diagonal")),
    "SINGD/default, without rows": _as_it_is(build=_without_rows),
    "SINGD/default, without rows, diagonal": _as_it_is(
        build=partial(_without_rows, structures="diagonal")
    ),
    "SINGD/compiled": Entry(
        build=partial(_default, compile_step=True),
        rates=(settings().lr,),
        refreshes=True,
        measured=(10,),
        devices=("cuda",),
    ),
    "SINGD/dense": _ours(build=partial(_singd, "dense")),
    "SINGD/diagonal": _ours(build=partial(_singd, "diagonal")),
    "SINGD/block30": _ours(build=partial(_singd, "blockdiagonal:30")),
    "SINGD/hierarchical": _ours(build=partial(_singd, "hierarchical:15,15")),
    "SINGD/toeplitz": _ours(build=partial(_singd, "triltoeplitz")),
    "SINGD/kfac": _ours(build=partial(_singd, "dense", kfac=True)),
    # the authors' update: what their package and this one take for the same mathematics
    "SINGD-paper/dense": _ours(build=partial(_singd, "dense", recipe="paper")),
    "SINGD-paper/diagonal": _ours(build=partial(_singd, "diagonal", recipe="paper")),
    "SINGD-paper/block30": _ours(build=partial(_singd, "blockdiagonal:30", recipe="paper")),
    "SINGD-paper/hierarchical": _ours(build=partial(_singd, "hierarchical:15,15", recipe="paper")),
    "SINGD-paper/toeplitz": _ours(build=partial(_singd, "triltoeplitz", recipe="paper")),
    "singd-0.0.5/dense": _authors(build=partial(_authors_singd, "dense")),
    "singd-0.0.5/diagonal": _authors(build=partial(_authors_singd, "diagonal")),
    "singd-0.0.5/block30": _authors(build=partial(_authors_singd, "block30diagonal")),
    "singd-0.0.5/hierarchical": _authors(build=partial(_authors_singd, "hierarchical15_15")),
    "singd-0.0.5/toeplitz": _authors(build=partial(_authors_singd, "triltoeplitz")),
    "SOAP/heavyball": _heavy(build=_heavyball_soap, late=True),
    "PSGD/heavyball": _heavy(build=_heavyball_psgd),
    "SOAP/pytorch-optimizer": _collected(build=_collected_soap),
    "PSGD/pytorch-optimizer": _collected(build=_collected_psgd),
}
