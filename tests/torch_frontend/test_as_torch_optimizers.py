"""What torch's own tests ask of every one of its optimizers, asked of SINGD in every configuration.

`test/test_optim.py` and `torch.testing._internal.common_optimizers` of PyTorch have the promises.
What concerns flags that SINGD does not have (`foreach`, `fused`, `maximize`,
`differentiable`, `capturable`) and sparse gradients is left out.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from singd_torch import SINGD

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "another rate": {"lr": 0.01},
    "tensor rate": {"lr": torch.tensor(0.05)},
    "weight decay": {"weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "diagonal": {"structures": "diagonal"},
    "paper": {"recipe": "paper", "lr": 0.01},
    "paper with weight decay": {"recipe": "paper", "lr": 0.01, "weight_decay": 0.1},
    "paper without momentum": {"recipe": "paper", "lr": 0.01, "momentum": 0.0, "T": 1},
    "kfac": {"recipe": "paper", "kfac": True, "lr": 0.01, "damping": 0.1},
}


class Regression(nn.Module):
    """ŷ = W x + b: as a layer, or of bare parameters, which AdamW trains."""

    def __init__(self, layer: bool, strided: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(10, 5, generator=g), torch.randn(10, generator=g)
        if strided:  # not contiguous
            weight, bias = (torch.stack([p, p], -1)[..., 0] for p in (weight, bias))
        if layer:
            self.layer = nn.Linear(5, 10)
            self.layer.weight, self.layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        else:
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.input = torch.randn(7, 5, generator=g)

    def forward(self) -> Tensor:
        x = self.input
        y: Tensor = self.layer(x) if hasattr(self, "layer") else x @ self.weight.mT + self.bias
        return y

    def loss(self) -> Tensor:
        return self().square().sum(1).mean()


def closure_of(model: Regression, optimizer: optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    return closure


def made(config: str, layer: bool) -> tuple[Regression, SINGD]:
    model = Regression(layer)
    return model, SINGD(model, **copy.deepcopy(CONFIGS[config]))


def stepped(config: str, layer: bool, n: int = 3) -> tuple[Regression, SINGD]:
    model, optimizer = made(config, layer)
    for _ in range(n):
        optimizer.step(closure_of(model, optimizer))
    return model, optimizer


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


every = pytest.mark.parametrize(
    ("config", "layer"),
    list(itertools.product(CONFIGS, [True, False])),
    ids=lambda value: {True: "layer", False: "bare"}.get(value, value),
)

# ---- where it goes -----------------------------------------------------------------------------

SCHEDULES: dict[str, list[Callable[[Any], Any]]] = {
    "none": [],
    "step": [lambda o: schedules.StepLR(o, gamma=0.9, step_size=10)],
    "plateau": [schedules.ReduceLROnPlateau],
    "linear": [lambda o: schedules.LinearLR(o, start_factor=0.4, total_iters=4)],
    "exponential": [lambda o: schedules.ExponentialLR(o, gamma=0.99)],
    "two": [
        lambda o: schedules.StepLR(o, gamma=0.99, step_size=10),
        lambda o: schedules.ExponentialLR(o, gamma=0.99),
        schedules.ReduceLROnPlateau,
    ],
    "sequence": [
        lambda o: schedules.SequentialLR(
            o,
            [schedules.ConstantLR(o, 0.5, 3), schedules.CosineAnnealingLR(o, 30)],
            milestones=[3],
        )
    ],
    "chain": [
        lambda o: schedules.ChainedScheduler(
            [schedules.MultiStepLR(o, [5, 9]), schedules.PolynomialLR(o, 40)]
        )
    ],
    "cosine with restarts": [lambda o: schedules.CosineAnnealingWarmRestarts(o, 10)],
    "one cycle": [lambda o: schedules.OneCycleLR(o, 0.05, total_steps=40)],
    "cyclic": [lambda o: schedules.CyclicLR(o, 0.01, 0.05, 5, cycle_momentum=False)],
    "a product": [lambda o: schedules.MultiplicativeLR(o, lambda _: 0.98)],
    "from zero": [lambda o: schedules.LambdaLR(o, lambda step: min(1.0, step / 10))],
    "averaged weights": [lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3)],
}


@every
def test_the_loss_falls(config: str, layer: bool) -> None:
    model, optimizer = made(config, layer)
    before = model.loss().item()
    for _ in range(40):
        optimizer.step(closure_of(model, optimizer))
    assert model.loss().item() < before
    assert repr(optimizer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("config", ["default", "tensor rate", "paper"])
def test_the_loss_falls_under_a_schedule(config: str, schedule: str) -> None:
    for layer in (True, False):
        model, optimizer = made(config, layer)
        running = [make(optimizer) for make in SCHEDULES[schedule]]
        before = model.loss().item()
        for _ in range(30):
            loss = optimizer.step(closure_of(model, optimizer))
            for one in running:
                if isinstance(one, schedules.ReduceLROnPlateau):
                    one.step(loss.detach())
                else:
                    one.step()
        assert model.loss().item() < before
        assert optimizer.skipped == 0


@pytest.mark.parametrize("layer", [True, False])
def test_parameters_that_are_not_contiguous_go_the_same_way(layer: bool) -> None:
    a, b = Regression(layer), Regression(layer, strided=True)
    assert not next(b.parameters()).is_contiguous()
    for model in (a, b):
        optimizer = SINGD(model)
        for _ in range(5):
            optimizer.step(closure_of(model, optimizer))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("layer", [True, False])
def test_groups_have_rates_and_decays_of_their_own(layer: bool) -> None:
    for own in ({"lr": 0.05, "fallback_lr": 0.02}, {"weight_decay": 0.3}, {"lr": 0.0}):
        model = Regression(layer)
        weight, bias = model.parameters()
        optimizer = SINGD(model, [{"params": [weight]}, {"params": [bias], **own}])
        before, start = values(model), model.loss().item()
        for _ in range(20):
            optimizer.step(closure_of(model, optimizer))
        assert model.loss().item() < start
        assert torch.equal(bias, before[1]) == (own.get("lr") == 0.0)


def test_a_rate_that_is_a_tensor_has_no_axes() -> None:
    for lr in (torch.tensor([0.1]), torch.ones(2)):
        with pytest.raises(ValueError, match=r"lr=tensor.*: must be a number or a 0-d"):
            SINGD(nn.Linear(3, 2), lr=lr)


def test_complex_parameters_step_as_their_two_parts() -> None:
    """On a function whose gradient depends on both."""
    both = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in (both.real, both.imag)]

    def rosenbrock(z: Tensor) -> Tensor:
        x, y = z
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    one, two = SINGD(nn.Module(), [both]), SINGD(nn.Module(), parts)
    for _ in range(10):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(both).backward()
        rosenbrock(torch.complex(*parts)).backward()
        torch.testing.assert_close(torch.view_as_real(both.grad)[..., 0], parts[0].grad)
        one.step()
        two.step()
        torch.testing.assert_close(both.real, parts[0])
        torch.testing.assert_close(both.imag, parts[1])


# ---- steps that do nothing ---------------------------------------------------------------------


@every
def test_a_step_without_gradients_does_nothing(config: str, layer: bool) -> None:
    model, optimizer = stepped(config, layer)
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.step()
    assert same(values(model), before)
    assert same(optimizer.state_dict()["state"], state)


@every
def test_a_step_along_zero_gradients_moves_by_momentum_and_decay_alone(
    config: str, layer: bool
) -> None:
    model, optimizer = made(config, layer)
    for group in optimizer.param_groups:
        group |= {"fallback_weight_decay": 0.0, "weight_decay": 0.0}
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # no warning either: a layer without inputs has such gradients and no rows
    assert same(values(model), before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_nothing(set_to_none: bool) -> None:
    model, optimizer = stepped("default", layer=True)
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all((g is None) if set_to_none else (g.count_nonzero() == 0) for g in gradients)


def test_parameters_may_be_empty_arrays() -> None:
    model = nn.Module()
    model.nothing, model.something = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(3))
    optimizer = SINGD(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert model.something.max() < 1.0


def test_parameters_may_have_dtypes_of_their_own() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=d)) for d in dtypes])
    optimizer = SINGD(model, fallback_lr=0.1, warmup=0)
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.dtype for p in model] == list(dtypes)
    assert all((p.abs() < 1.0).all() for p in model)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "non-leaf"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([{"params": ["weight"]}], TypeError, "can only optimize Tensors"),
        ("weight", TypeError, "params must be parameters"),
    ],
    ids=["empty", "not a leaf", "a name", "a name in a group", "a string"],
)
def test_what_cannot_be_trained_is_refused(
    params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SINGD(nn.Linear(3, 2), params)


def test_a_single_tensor_is_a_parameter() -> None:
    model = nn.Linear(3, 2)
    assert SINGD(model, model.weight).param_groups[0]["params"] == [model.weight]


# ---- state -------------------------------------------------------------------------------------


@every
def test_a_loaded_optimizer_goes_on_alike(config: str, layer: bool) -> None:
    model, optimizer = stepped(config, layer)
    twin = Regression(layer)
    twin.load_state_dict(model.state_dict())
    other = SINGD(twin, **copy.deepcopy(CONFIGS[config]))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer))
        other.step(closure_of(twin, other))
        assert same(values(model), values(twin))
    assert same(saved, kept)
    assert same(optimizer.state_dict(), other.state_dict())


def test_groups_that_are_repeated_are_saved_alike() -> None:
    _, optimizer = stepped("default", layer=True)
    saved = optimizer.state_dict()["param_groups"]
    optimizer.param_groups.extend(optimizer.param_groups)
    assert same(optimizer.state_dict()["param_groups"][-1], saved[-1])


@every
def test_a_state_dict_is_what_weights_only_loads(config: str, layer: bool, tmp_path: Any) -> None:
    _, optimizer = stepped(config, layer)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), optimizer.state_dict())


@every
def test_copies_and_pickles_have_what_is_public(config: str, layer: bool) -> None:
    _, optimizer = stepped(config, layer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, twin)]
        assert public[0] == public[1]
        assert same(twin.state_dict(), optimizer.state_dict())
        assert same(twin.defaults, optimizer.defaults | {"differentiable": False})  # torch's own


def test_state_is_there_after_a_step() -> None:
    for config in CONFIGS:
        _, optimizer = stepped(config, layer=False, n=1)
        assert all(len(entries) > 0 for entries in optimizer.state.values())
        assert len(optimizer.state) == 2


def test_names_are_kept_and_do_not_change_what_is_loaded() -> None:
    named, plain = Regression(layer=True), Regression(layer=True)
    a, b = SINGD(named, named.named_parameters()), SINGD(plain)
    a.step(closure_of(named, a))
    assert a.param_groups[0]["param_names"] == ["layer.weight", "layer.bias"]
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["param_names"] == ["layer.weight", "layer.bias"]
    plain.load_state_dict(named.state_dict())
    a.step(closure_of(named, a))
    b.step(closure_of(plain, b))
    assert same(values(named), values(plain))
    with pytest.raises(ValueError, match="with/without names"):
        a.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# ---- hooks -------------------------------------------------------------------------------------


def test_hooks_are_called_in_order() -> None:
    model, optimizer = made("default", layer=True)
    calls: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_: calls.append(text)

    handles = [
        register_optimizer_step_pre_hook(note("before all")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("after all")),
    ]
    optimizer.step(closure_of(model, optimizer))
    assert calls == ["before all", "before", "after", "after all"]
    for handle in handles:
        handle.remove()
    optimizer.step(closure_of(model, optimizer))
    assert len(calls) == 4


def test_a_hook_may_change_what_a_step_is_called_with() -> None:
    model, optimizer = made("default", layer=True)
    closure = closure_of(model, optimizer)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    before = values(model)
    assert optimizer.step() is not None
    assert not same(values(model), before)


def test_hooks_of_saving_change_what_is_saved() -> None:
    _, optimizer = stepped("default", layer=True)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, saved: saved["state"].clear())
    saved = optimizer.state_dict()
    assert calls == ["before"]
    assert not any(saved["state"].values())


def test_hooks_of_loading_change_what_is_loaded() -> None:
    model, optimizer = stepped("default", layer=True)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def rate(value: float) -> Callable[..., Any]:
        def hook(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            calls.append(value)
            changed = copy.deepcopy(state_dict)
            changed["param_groups"][0]["lr"] = value
            return changed

        return hook

    optimizer.register_load_state_dict_pre_hook(rate(0.002))
    optimizer.register_load_state_dict_pre_hook(rate(0.003), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: o.param_groups[0].update(lr=0.5))
    seen: list[float] = []
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.param_groups[0]["lr"]), prepend=True
    )
    optimizer.load_state_dict(saved)
    assert calls == [0.003, 0.002]
    assert seen == [0.002]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] == 0.12
    optimizer.step(closure_of(model, optimizer))


# ---- averages of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averages_of_the_weights_follow(average: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SINGD(model)
    averaged = AveragedModel(model, multi_avg_fn=average)
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    x, y = torch.randn(32, 5), torch.randint(3, (32,))
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
        seen.append(model[0].weight.detach().clone())
    update_bn([x], averaged)
    expected = torch.stack(seen).mean(0)
    if average is not None:
        expected = seen[0]
        for weight in seen[1:]:
            expected = expected.lerp(weight, 0.1)
    torch.testing.assert_close(averaged.module[0].weight, expected)
    assert optimizer.skipped == 0
