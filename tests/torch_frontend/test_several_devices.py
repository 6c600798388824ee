"""Models with parameters on several GPUs of one process; fake ones know of devices alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases
from torch import Tensor, nn
from watched import layers

from singd_core.testing.fake_cuda import fake_cuda
from singd_torch import SINGD
from singd_torch.layers.pending import Pending, Rows

SHAPES = {
    "a.weight": (8, 8),
    "a.bias": (8,),
    "b.weight": (8, 8),
    "b.bias": (8,),
    "head.weight": (4, 8),
    "norm.weight": (8,),
    "convolution.weight": (4, 2, 3),
}


def named(device: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {
        f"{device}.{name}": nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        for name, shape in SHAPES.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "diagonal": {"structures": "diagonal"},
    "no momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "paper": {"recipe": "paper"},
    "kfac": {"rule": "kfac"},
    "a rate on the first": {"rate": "cuda:0"},
    "a rate on the second": {"rate": "cuda:1"},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "kahan": {"dtype": torch.bfloat16, "rounding": "kahan"},
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=pytest.mark.slow)])
# the others have kernels of these
@pytest.mark.parametrize(
    "case", cases(CASES, fast=["default", "decay", "paper", "kfac", "a rate on the second"])
)
def test_a_step_does_not_mix_devices(case: str, scaled: bool) -> None:
    given = dict(CASES[case])
    dtype, rate = given.pop("dtype", torch.float32), given.pop("rate", None)
    with fake_cuda():
        params = named("cuda:1", dtype) | named("cuda:0", dtype)
        if rate is not None:  # there is no fake of AdamW with such a rate
            params = {name: p for name, p in params.items() if "norm" not in name}
        optimizer: Any = SINGD(params.items(), T=2, **given)
        for _ in range(5):
            for p in params.values():
                p.grad = torch.ones_like(p)
            if scaled:
                optimizer.grad_scale = torch.full((), 8.0, device="cuda:0")
                optimizer.found_inf = torch.full((), 0.0, device="cuda:0")
            optimizer.step()
            if rate is not None:  # before the first step its value is asked for
                optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device=rate)
        for p in params.values():
            of_p = [x for x in optimizer.state[p].values() if isinstance(x, Tensor)]
            assert all(x.device == p.device for x in of_p)


def test_sums_of_rows_go_to_where_the_weight_is_kept() -> None:
    layer = layers(SINGD(nn.Linear(3, 2)))[0]
    by, rows = layer.first_factors(), Rows(torch.ones(4, 4), 4, torch.ones(4, 2), 4)
    (found,) = Pending.measured([by], [rows], 0, swapped=False)
    moved = found.on(torch.device("meta"))
    assert {t.device.type for t in moved.tensors()} == {"meta"}
    assert found.on(torch.device("cpu")) is found
