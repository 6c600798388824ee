"""On an accelerator a step masks with `torch.where` and never waits: shown without one."""

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import singd_torch.optimizer
from singd_torch import SINGD, _fallback
from singd_torch._groups import settings_of_step
from singd_torch.tensors import finite

BF16 = torch.bfloat16

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.01},
    "normalized lr_cov": {"recipe": "paper", "normalize_lr_cov": True},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "hierarchical": {"structures": ("hierarchical:2,2", "hierarchical:1,1")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decoupled decay": {"weight_decay": 0.1},
    "default with normalized lr_cov": {"normalize_lr_cov": True},
    "no momentum, reduce": {"momentum": 0.0, "kfac_approx": "reduce"},
}


class NoCopy(TorchFunctionMode):
    """Forbids numbers of the host to be copied to a device: it is a wait, which `full` is not."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        assert function not in (torch.tensor, torch.as_tensor) or result.device.type == "cpu"
        return result


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Linear(8, 3, bias=False),
    )


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x).float(), y).backward()


def batch(poison: float = 0.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 2, 4, 4)
    x[3, 1, 2, 2] += poison
    return x, torch.randint(3, (8,))


class NoSync(TorchDispatchMode):
    """Forbids the operations by which the host reads a tensor's value."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name in (
            "aten::_local_scalar_dense",
            "aten::is_nonzero",
            "aten::nonzero",
            "aten::equal",
        ):
            raise AssertionError(f"{name}: the host waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The path of an accelerator, on the CPU with its real numbers."""
    monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    return monkeypatch


def numbers(model: nn.Module, optimizer: SINGD) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} | {k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def run(given: dict[str, Any], poisons: list[float], sync: bool) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(0)
    model = network()
    optimizer = SINGD(model, **given)
    for poison in poisons:
        optimizer.zero_grad()
        backward(model, *batch(poison))
        if sync:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*NaN or infinite")
                optimizer.step()
        else:
            with NoSync():
                optimizer.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN or infinite")
        return numbers(model, optimizer), optimizer.skipped


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("poisons", [[0.0] * 4, [0.0, NAN, 0.0, INF, 0.0]], ids=["finite", "not"])
@pytest.mark.parametrize("case", CASES)
def test_masked_step_takes_the_steps_of_the_host_and_never_syncs(
    case: str, poisons: list[float], masked: pytest.MonkeyPatch
) -> None:
    ours, skipped = run(CASES[case], poisons, sync=False)
    masked.undo()
    expected, expected_skipped = run(CASES[case], poisons, sync=True)
    assert skipped == expected_skipped == sum(p != 0.0 for p in poisons)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        # The fused AdamW of accelerators rounds in another order than the one of the host, whose
        # scalars are doubles; an inverse multiplies that by its condition, up to its largest entry.
        atol = 1e-6 * max([1.0, *value.abs().flatten().tolist()])
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_masked_step_that_is_not_finite_changes_no_bit(
    case: str, masked: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = SINGD(model, **CASES[case])
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, *batch())
        optimizer.step()
    before = numbers(model, optimizer)
    optimizer.zero_grad()
    backward(model, *batch(NAN))
    optimizer.step()  # without a warning: that would wait for the device
    after = numbers(model, optimizer)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    with pytest.warns(UserWarning, match="^the gradients? of '.*NaN or infinite"):
        assert optimizer.skipped == 1
    masked.setattr(finite, "norms", None)  # what was warned of is not found again
    assert optimizer.skipped == 1


def test_first_step_that_is_not_finite_leaves_a_fresh_state(masked: pytest.MonkeyPatch) -> None:
    """The masked path has made its state by then: it must be as good as none."""
    given = CASES["normalized"]
    ours, _ = run(given, [NAN, 0.0, 0.0], sync=False)
    masked.undo()
    expected, _ = run(given, [NAN, 0.0, 0.0], sync=True)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


META = [*((case, torch.float32) for case in CASES), ("normalized", BF16), ("paper", torch.float16)]
# Norms along an axis of one number keep that axis in torch 2.8, on the meta device alone.
NORMS_KEEP_AXES = torch.linalg.vector_norm(torch.empty(2, 1, device="meta"), dim=(-1,)).ndim > 1


@pytest.mark.parametrize(("case", "dtype"), META, ids=str)
def test_step_runs_on_the_meta_device(case: str, dtype: torch.dtype) -> None:
    """There are shapes, dtypes and a device, and no values that could be read."""
    if case == "hierarchical" and NORMS_KEEP_AXES:
        pytest.skip("this torch has wrong shapes on the meta device")
    model = network().to("meta", dtype)
    optimizer = SINGD(model, **CASES[case])
    for _ in range(3):
        optimizer.zero_grad()
        x, y = batch()
        backward(model, x.to("meta", dtype), y.to("meta"))
        with NoCopy():
            optimizer.step()
    values = [v for p in model.parameters() for v in optimizer.state[p].values()]
    assert {v.device.type for v in values} == {"meta"}
    factors = optimizer.state[model[4].weight].items()
    wide = torch.float32 if dtype == torch.float16 else dtype
    stored = {
        v.dtype for name, v in factors if not name.startswith(("averages.", "late.", "levels."))
    }
    assert stored == {wide}


def test_the_state_of_adamw_moves_to_a_device_with_its_parameter() -> None:
    p = nn.Parameter(torch.empty(3, device="meta"))
    state = {p: _fallback.initial(nn.Parameter(torch.zeros(3)), on_device=False)}
    (group,) = SINGD(nn.Linear(1, 1)).param_groups
    skip = torch.zeros((), device="meta")
    warm = settings_of_step(group, 1).warm
    new = _fallback.step(group, [p], [torch.empty_like(p)], state, skip, warm)
    assert [value.device.type for value in new] == ["meta"]
    assert {name: value.device.type for name, value in state[p].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_a_kernel_of_adamw_that_does_not_ask_changes_nothing(masked: pytest.MonkeyPatch) -> None:
    """As the one of Apple's GPUs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    adamw = _fallback.adamw

    def blind(*args: Any, found_inf: Any, **given: Any) -> None:
        adamw(*args, found_inf=None, **given)

    masked.setattr(_fallback, "adamw", blind)
    masked.setattr(_fallback, "_ASKS", ())
    optimizer = SINGD(model)
    for poison in (0.0, NAN):
        before = numbers(model, optimizer)
        optimizer.zero_grad()
        (model(torch.randn(8, 3)).square().mean() + poison * model[1].bias.sum()).backward()
        optimizer.step()
        after = numbers(model, optimizer)
        same = {
            name: torch.equal(x, after[name]) for name, x in before.items() if "step" not in name
        }
        assert set(same.values()) == {poison != 0.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_step_on_a_gpu_never_syncs_and_equals_the_host(case: str) -> None:
    model = network()
    twin = copy.deepcopy(model).to("cuda")
    host, gpu = SINGD(model, **CASES[case]), SINGD(twin, **CASES[case])
    # after 0, 1, 2, 4, 8, ... refreshes rows are compared with gradients, and the host waits
    for step in range(4):
        x, y = batch()
        for net, optimizer, device in ((model, host, "cpu"), (twin, gpu, "cuda")):
            optimizer.zero_grad()
            backward(net, x.to(device), y.to(device))
            torch.cuda.set_sync_debug_mode("error" if step == 3 and device == "cuda" else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-3, atol=1e-4)


RATES = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "lr_cov": 0.05,
    "damping": 0.001,
    "alpha1": 0.5,
    "factor_bound": 0.5,
    "fallback_lr": 0.01,
    "fallback_betas": 0.9,
    "fallback_eps": 1e-8,
    "fallback_weight_decay": 0.01,
}
WITH: dict[str, dict[str, Any]] = {
    "normalized": {"T": 2, "growing_T": False, "weight_decay": 0.01},
    "coupled decay": {"weight_decay": 0.01, "decoupled_weight_decay": False},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.01, "decoupled_weight_decay": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("case", WITH)
def test_a_setting_that_is_negative_or_not_finite_changes_no_bit(
    case: str, name: str, masked: pytest.MonkeyPatch
) -> None:
    rate = torch.tensor(RATES[name])
    given: Any = (rate, 0.999) if name == "fallback_betas" else rate
    # torch's AdamW reads all but its rate
    sync = name.startswith("fallback_") and name != "fallback_lr"
    # with T=2 the next step refreshes, or it measures for that
    for steps, wrong in ((2, NAN), (3, NAN), (3, -INF), (2, -0.1)):
        model = network()
        optimizer = SINGD(model, **WITH[case] | {name: given})
        for _ in range(steps):
            optimizer.zero_grad()
            backward(model, *batch())
            optimizer.step()
        before = numbers(model, optimizer)
        rate.fill_(wrong)
        optimizer.zero_grad()
        backward(model, *batch())
        with contextlib.nullcontext() if sync else NoSync():
            optimizer.step()
        rate.fill_(RATES[name])
        with pytest.warns(
            UserWarning,
            match="^a setting was negative, or it or a gradient or row was NaN or infinite",
        ):
            assert optimizer.skipped == 1
        for key, value in numbers(model, optimizer).items():
            assert torch.equal(value, before[key]), key


def test_a_bound_may_be_an_infinite_tensor(masked: pytest.MonkeyPatch) -> None:
    given = {"T": 1, "growing_T": False, "warmup": 0}
    ours, skipped = run(given | {"factor_bound": torch.tensor(INF)}, [0.0] * 3, sync=False)
    expected, _ = run(given | {"factor_bound": 1e30}, [0.0] * 3, sync=False)
    assert skipped == 0
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_a_rate_that_is_not_finite_leaves_nothing_behind(
    masked: pytest.MonkeyPatch, wrong: float
) -> None:
    model, rate = network(), torch.tensor(0.1)
    optimizer = SINGD(model, lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, *batch())
        optimizer.step()
    before, largest = numbers(model, optimizer), optimizer.param_groups[0]["largest_lr"]
    rate.fill_(wrong)
    optimizer.step()
    after = numbers(model, optimizer)
    assert all(torch.equal(x, after[name]) for name, x in before.items() if "| step" not in name)
    assert largest == optimizer.param_groups[0]["largest_lr"] == torch.tensor(0.1)
    rate.fill_(0.05)
    optimizer.step()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert optimizer.skipped == 1
    moved = zip(before.values(), numbers(model, optimizer).values(), strict=True)
    assert not any(torch.equal(x, y) for x, y in list(moved)[: len(list(model.parameters()))])
