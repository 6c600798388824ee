"""AdamW, torch's own, for the parameters that no layer owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from singd_core._array import cast, widen
from singd_core._recipes import check_adamw
from singd_core._scalars import at_least
from singd_core.adamw import LEAST_EPS, Fallback

RATES = "fallback_lr", "fallback_eps", "fallback_weight_decay"
_NAMES = "lr", "betas", "eps", "weight_decay"

# Devices whose fused kernel changes nothing where `found_inf` is 1; MPS does not look at it.
_ASKS = "cpu", "cuda", "xpu"


def step(
    group: dict[str, Any],
    params: Sequence[nn.Parameter],
    grads: Sequence[Tensor],
    state: dict[Any, dict[str, Any]],
    skip: Tensor | None,
    warm: Any,
) -> Sequence[Tensor]:
    """One step of fallback parameters of a group; returns what they become.

    Args:
        group: The parameter group.
        params: Its fallback parameters that have a gradient.
        grads: Their gradients.
        state: The optimizer's state, extended where it is missing.
        skip: On an accelerator, 1 where nothing may change, else 0.
        warm: The share of the rate that a warm-up leaves.
    """
    # In float16 squares and epsilon fall to 0, and 0 / 0 is NaN; in bfloat16 an average of squares
    # cannot forget. Such parameters step as copies.
    wide = [widen(p) for p in params]
    for p, like in zip(params, wide, strict=True):
        own = state[p]
        if "exp_avg" not in own:
            own.update(initial(p, on_device=skip is not None))
        for name in ("exp_avg", "exp_avg_sq"):  # where they are, unless the model was moved or cast
            own[name] = own[name].to(like)
        # torch takes no count in 16 bits, as whoever casts a whole checkpoint makes it
        own["step"] = own["step"].to("cpu" if skip is None else p.device, torch.float32)
    beta1, beta2 = group["fallback_betas"]
    ratio = warm * group["lr"] / at_least(group["largest_lr"], group["base_lr"])
    fused = skip is not None
    lr, weight_decay = group["fallback_lr"] * ratio, group["fallback_weight_decay"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = lr.float()  # a kernel of CUDA reads 32 bits, whatever the dtype
    if not fused:  # without a device that would have to be waited for, torch wants numbers
        lr, weight_decay = float(lr), float(weight_decay)
    weights = [real(p) for p in wide]
    means, squares = ([real(state[p][name]) for p in params] for name in ("exp_avg", "exp_avg_sq"))
    before = [
        (x, x.detach().clone())
        for x in (*weights, *means, *squares)
        if fused and x.device.type not in _ASKS
    ]
    adamw(
        weights,
        [real(cast(g, like)) for g, like in zip(grads, wide, strict=True)],
        means,
        squares,
        [],
        [state[p]["step"] for p in params],
        foreach=not fused,
        fused=fused,
        found_inf=skip,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=at_least(group["fallback_eps"], LEAST_EPS),
        maximize=False,
    )
    for x, old in before:
        moves = skip.to(x.device) == 0.0  # type: ignore[union-attr]
        x.detach().copy_(torch.where(moves, x, old))
    return wide


def real(x: Tensor) -> Tensor:
    """A tensor, of complex numbers as pairs of real ones in the same memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def initial(p: nn.Parameter, *, on_device: bool) -> dict[str, Tensor]:
    """The state of a parameter before its first step; the count is a number of the host, or not."""
    exp_avg = torch.zeros_like(widen(p), memory_format=torch.preserve_format)
    step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": torch.zeros_like(exp_avg)}


def check(group: dict[str, Any]) -> None:
    """Check the settings of the fallback.

    Raises:
        ValueError: Naming the setting, its value and its range.
    """
    check_adamw(vars(settings_of(group)), "fallback_")


def settings_of(group: dict[str, Any]) -> Fallback:
    """The settings of the fallback of a parameter group."""
    return Fallback(**{name: group[f"fallback_{name}"] for name in _NAMES})
