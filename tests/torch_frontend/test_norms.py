"""Norms of large tensors, which one dot product makes on a CPU."""

import pytest
import torch
from torch import Tensor

from singd_core._array import cumulative_sum, norm
from singd_torch.tensors import kernels
from singd_torch.tensors.norms import each_norm

N = 1 << 17  # numbers of a large one
CASES: dict[str, Tensor] = {
    "a matrix": torch.randn(512, 300),
    "one of a stack": torch.randn(1, 512, 300),
    "a stack": torch.randn(2, 512, 300),
    "a transpose": torch.randn(512, 300).mT,
    "in the middle of a memory": torch.randn(N + 3)[3:].view(256, -1),
    "of 16 bits": torch.randn(512, 300).bfloat16(),
    "of 64 bits": torch.randn(512, 300, dtype=torch.float64),
    "with infinity": torch.full((512, 300), torch.inf),
    "with NaN": torch.full((512, 300), torch.nan),
    "whose squares overflow": torch.full((512, 300), 1e30),
    "empty": torch.zeros(0, 300),
    "channels last": torch.randn(32, 16, 20, 20).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_all_numbers(case: str) -> None:
    x = CASES[case]
    wide = torch.promote_types(x.dtype, torch.float32)
    finfo = torch.finfo(wide)
    exact = x.double().square().sum((-2, -1))
    expected = torch.where(exact > finfo.max, torch.inf, exact).sqrt().to(wide)
    # the squares of N positive numbers are summed up in one go
    close = {"rtol": 4 * N**0.5 * finfo.eps, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(norm(x), expected, **close)
    (each,) = each_norm([x])
    torch.testing.assert_close(each, expected.square().sum().sqrt(), **close)


def test_large_ones_and_others_keep_their_places() -> None:
    given = [torch.randn(n) for n in (3, N, 5, 2 * N, 0)]
    found = torch.stack(list(each_norm(given)))
    torch.testing.assert_close(found, torch.stack([x.norm() for x in given]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (3, 257), (2, 2, 1000), (0,), (2, 0)])
def test_cumulative_sums_that_may_not_depend_on_an_order(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(kernels, "on_host", lambda x: False)
    monkeypatch.setattr(Tensor, "cumsum", None)  # CUDA refuses it then
    torch.use_deterministic_algorithms(True)
    try:
        found = cumulative_sum(x)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    torch.testing.assert_close(found, x.cumsum(-1), rtol=1e-12, atol=1e-12)
