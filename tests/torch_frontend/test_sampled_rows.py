"""A group may say how many rows a factor gets; the probe is on what an output is a view of."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from watched import layers, see_rows

from singd_torch import SINGD
from singd_torch.capture import tap
from singd_torch.layers.pending import Pending
from singd_torch.step.curvatures import curvature as curvature_of

# Relative, float64: sums of some hundred numbers in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
DENSE = {"recipe": "paper", "structures": ("dense", "dense")}


def sampled(model: nn.Module, rows: float, **given: Any) -> SINGD:
    return SINGD(model, rows=rows, **given)


def curvatures(optimizer: SINGD) -> dict[str, Tensor]:
    found = {}
    for layer in layers(optimizer):
        curvature = curvature_of([layer], 1.0)
        found |= {
            f"{layer.name} U": curvature.H_K.dense(),
            f"{layer.name} G": curvature.H_C.dense(),
        }
    return found


def mean_over_steps(
    model: nn.Module, rows: int, steps: int, backward: Any, **given: Any
) -> dict[str, Tensor]:
    """The mean curvature at the same weights, as if so many steps had been taken."""
    optimizer, total = sampled(model, rows, **DENSE | given), Counter[str]()
    for step in range(steps):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["steps"] = step
        backward(optimizer)
        total.update(curvatures(optimizer))
    return {name: value / steps for name, value in total.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_average", "masked"),
    [
        ("batch+sequence", True),
        pytest.param("batch", False, marks=pytest.mark.slow),
        pytest.param("batch", True, marks=pytest.mark.slow),
        pytest.param("batch+sequence", False, marks=pytest.mark.slow),
    ],
)
def test_the_mean_over_steps_is_the_curvature_of_all_rows(loss_average: str, masked: bool) -> None:
    """Of two micro-batches of different size too, with masks of different shares."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(12, 8, 4, dtype=torch.float64)
    mask = torch.rand(12, 8) < 0.6

    def backward(optimizer: SINGD) -> None:
        for part in (slice(0, 8), slice(8, 12)):
            optimizer.mask_rows(mask[part] if masked else None)
            kept = mask[part][..., None] if masked else torch.ones(1)
            ((model(x[part]) - 1.0).square() * kept).sum().div(96).backward()

    exact = mean_over_steps(model, 10**6, 1, backward, loss_average=loss_average)
    mean = mean_over_steps(model, 16, 768, backward, loss_average=loss_average)
    for name, value in exact.items():
        # 768 starts in the golden ratio are not each of 64 and of 32 equally often
        assert (mean[name] - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_as_many_rows_as_there_are_change_nothing(kfac_approx: str) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, groups=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)
    models = [nn.Sequential(*copy.deepcopy(layers)).double() for _ in range(3)]
    optimizers = [
        sampled(model, rows, kfac_approx=kfac_approx)
        for model, rows in zip(models, (math.inf, 96, 2), strict=True)
    ]
    for _ in range(3):
        x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            assert optimizer.skipped == 0
    every, as_many, few = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(p, q) for p, q in zip(every, as_many, strict=True))
    # factors that are wider than two rows get more of them, but not all 96 of the images
    assert not any(torch.equal(p, q) for p, q in zip(every[:2], few[:2], strict=True))


def test_a_factor_gets_as_many_rows_as_it_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2))
    optimizer = sampled(model, 8, structures=("dense", "diagonal"))
    measure, seen = Pending.measured, {}

    def measured(factors: Any, calls: Any, *given: Any, **how: Any) -> Any:
        seen.update({own.A.shape[-1]: (own.A.shape[-2], own.B.shape[-2], own.N) for own in calls})
        return measure(factors, calls, *given, **how)

    monkeypatch.setattr(Pending, "measured", measured)
    model(torch.randn(10, 9, 20)).sum().backward()
    optimizer.step()
    assert seen == {21: (21, 8, 90), 31: (31, 8, 90)}


def test_a_table_tied_to_a_linear_map_is_sampled_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).tanh())

    torch.manual_seed(0)
    model = Tied().double()
    x = torch.randint(6, (10, 8))

    def backward(optimizer: SINGD) -> None:
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1).flatten()).backward()

    exact = mean_over_steps(model, 10**6, 1, backward, structures=("dense", "diagonal"))
    mean = mean_over_steps(model, 8, 400, backward, structures=("dense", "diagonal"))
    for name, value in exact.items():
        assert (mean[name] - value).norm() <= 0.05 * value.norm(), name


# ---- processes ---------------------------------------------------------------------------------


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = sampled(model, 8)
    wrapped = DistributedDataParallel(model)
    for x in torch.randn(3, world, 6, 5, 4, dtype=torch.float64):
        optimizer.zero_grad()
        wrapped(x[rank]).square().sum(-1).mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save([p.detach() for p in model.parameters()], f"{folder}/weights")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_add_up_their_samples(tmp_path: Path) -> None:
    """As the micro-batches of one process do, which are sampled alike."""
    mp.spawn(work, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = sampled(model, 8)
    for x in torch.randn(3, 2, 6, 5, 4, dtype=torch.float64):
        optimizer.zero_grad()
        for part in x:
            (model(part).square().sum(-1).mean() / 2).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), torch.load(tmp_path / "weights"), strict=True):
        torch.testing.assert_close(p.detach(), q, **CLOSE)


# ---- the probe of a view -----------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts the operations that copy or fill as many numbers as the output has."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.found = numbers, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket._qualified_op_name
        of_size = isinstance(out, Tensor) and out.numel() == self.numbers
        copies = ("copy_", "clone", "new_zeros", "new_empty_strided", "zero_")
        if of_size and name.removeprefix("aten::") in copies:
            self.found[name] += 1
        return out


class Block(nn.Module):
    """Two linear layers on sequences."""

    def __init__(self, how: str, in_place: bool) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(in_place), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "plain":
            return self.head(self.body(x))
        h = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.how == "reentrant")
        return self.head(h)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("shape", [(7, 6), (4, 5, 6), (2, 3, 4, 6)], ids=str)
def test_factors_of_views_are_those_of_outputs(
    shape: tuple[int, ...], how: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the bit to a probe on the output itself."""
    states = []
    for on_base in (False, True):
        if not on_base:
            monkeypatch.setattr(tap, "_base", lambda output: output)
        torch.manual_seed(0)
        model = Block(how, in_place)
        optimizer = SINGD(model, structures=("dense", "dense"))
        for x in torch.randn(2, *shape):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        tensors = [optimizer.state[p] for p in model.parameters()]
        states.append([*model.parameters(), *(v for state in tensors for v in state.values())])
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_the_probe_of_a_view_copies_nothing() -> None:
    x, counts = torch.randn(4, 5, 6), []
    for optimized in (False, True):
        model = nn.Linear(6, 7)
        optimizer = SINGD(model) if optimized else None
        z = model(x)
        with Count(z.numel()) as count:
            z.backward(torch.ones_like(z))
        counts.append(count.found)
        assert optimizer is None or layers(optimizer)[0].pending
    kept = counts[1] - counts[0]
    assert set(kept) <= {"aten::clone"}  # of rows that wait
    assert sum(kept.values()) <= 1


def test_an_output_that_is_part_of_its_base_is_probed_itself() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :3]

    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mT.contiguous().mT

    for kind in (Half, Turned):
        torch.manual_seed(0)
        model, x = kind(6, 7).double(), torch.randn(4, 5, 6, dtype=torch.float64)
        of_call = nn.functional.linear(x, model.weight, model.bias)
        z = of_call[:, :3] if kind is Half else of_call
        z.square().sum().backward()
        expected, model.weight.grad = model.weight.grad, None
        optimizer = SINGD(model, recipe="paper", structures=("dense", "dense"))
        seen: list[Tensor] = []
        see_rows(optimizer, lambda layer, source, x, g, seen=seen: seen.append(g))  # type: ignore[misc]
        model(x).square().sum().backward()
        torch.testing.assert_close(model.weight.grad, expected, **CLOSE)
        rows = torch.zeros_like(of_call)  # of the call that is handed the weight
        rows[:, : z.shape[1]] = 2.0 * z.detach()
        torch.testing.assert_close(seen[0], rows, **CLOSE)
