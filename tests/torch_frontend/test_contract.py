"""What every torch optimizer does, and users rely on."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_core.structures import Diagonal, blockdiagonal
from singd_torch import SINGD
from singd_torch.capture import compiled


class Network(nn.Module):
    """Layers, and parameters of every kind that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(5, 5, 3, padding=1, groups=5)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.embed(x)) + self.shift).mean(1)
        return self.out(torch.tanh(self.hidden(x)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (12, 5)), torch.randint(3, (12,))


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return nn.functional.cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor] | None = None) -> None:
    optimizer.zero_grad()
    loss_of(model, data or batch()).backward()
    optimizer.step()


def moved(model: nn.Module, before: nn.Module) -> dict[str, float]:
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    return {name: (p - q).abs().max().item() for (name, p), q in pairs}


def test_every_parameter_is_trained() -> None:
    model = Network()
    before, optimizer = copy.deepcopy(model), SINGD(model)
    step(model, optimizer)
    assert min(moved(model, before).values()) > 0.0
    assert all(optimizer.state[p] for p in model.parameters())
    for p in model.parameters():
        momenta = [v for k, v in optimizer.state[p].items() if k in ("momentum_buffer", "exp_avg")]
        assert [m.shape for m in momenta] == [p.shape]


def test_fallback_is_torch_adamw() -> None:
    """What is no matrix takes the steps of torch.optim.AdamW."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.LayerNorm(6), nn.PReLU(6))
    twin = copy.deepcopy(model)
    settings = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    given = {f"fallback_{k}": v for k, v in settings.items()}
    ours = SINGD(model, fallback_lr=0.01, warmup=0, **given)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, foreach=True, **settings)
    for _ in range(5):
        x = torch.randn(12, 6)
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).sin().mean().backward()
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_step_as_pairs_of_real_ones(dtype: torch.dtype) -> None:
    """As in every optimizer of torch; decay, and the gradient's norm, included."""
    numbers = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    pairs = torch.view_as_real(numbers.detach()).clone().requires_grad_()
    given = {"recipe": "paper", "fallback_lr": 0.1, "fallback_weight_decay": 0.1, "warmup": 2}
    ours, theirs = (SINGD(nn.Module(), [p], **given) for p in (numbers, pairs))
    for _ in range(4):
        numbers.grad = torch.randn_like(numbers)
        pairs.grad = torch.view_as_real(numbers.grad).clone()
        ours.step()
        theirs.step()
        assert torch.equal(torch.view_as_real(numbers), pairs)
    again = SINGD(nn.Module(), [numbers.detach().clone().requires_grad_()], **given)
    again.load_state_dict(ours.state_dict())
    (kept,), (found,) = ours.state.values(), again.state.values()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    numbers.grad = torch.full_like(numbers, complex(0.0, float("inf")))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        ours.step()
    assert torch.equal(torch.view_as_real(numbers), pairs)


def test_complex_layers_are_trained_by_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=torch.complex64)
    x, W = torch.randn(64, 5, dtype=torch.complex64), torch.randn(3, 5, dtype=torch.complex64)
    optimizer = SINGD(model, fallback_lr=0.05, fallback_weight_decay=0.0)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - x @ W.T).abs().square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


# ---- parameter groups --------------------------------------------------------------------------


def test_a_bias_in_another_group_has_its_own_rate_and_decay() -> None:
    model, data = nn.Linear(4, 3), (torch.randn(9, 4), torch.randint(3, (9,)))
    nn.init.ones_(model.bias)
    given = {"recipe": "paper", "lr": 0.1, "momentum": 0.0}

    def change(params: Any) -> dict[str, Tensor]:
        net = copy.deepcopy(model)
        named = dict(net.named_parameters())
        groups = [{"params": [named[n] for n in names], **own} for names, own in params]
        step(net, SINGD(net, groups, **given), data)
        return {
            n: (p - q).detach() for (n, p), q in zip(named.items(), model.parameters(), strict=True)
        }

    together = change([(["weight", "bias"], {})])
    for own, factor, decay in [
        ({"lr": 0.05}, 0.5, 0.0),
        ({"lr": 0.0}, 0.0, 0.0),
        ({"weight_decay": 0.2}, 1.0, 0.2),
        ({"weight_decay": 0.2, "decoupled_weight_decay": True}, 1.0, 0.2),
    ]:
        found = change([(["weight"], {}), (["bias"], own)])
        assert torch.equal(found["weight"], together["weight"])
        # a bias of 1 moves in steps of 2⁻²⁴
        expected = factor * together["bias"] - 0.1 * decay
        torch.testing.assert_close(found["bias"], expected, rtol=0, atol=2.0**-22)
    decayed = change([(["weight"], {"weight_decay": 0.2}), (["bias"], {})])
    assert torch.equal(decayed["bias"], together["bias"])
    expected = together["weight"] - 0.1 * 0.2 * model.weight
    torch.testing.assert_close(decayed["weight"], expected.detach(), rtol=0, atol=2.0**-22)


def test_no_weight_decay_in_a_group_is_none_for_all_of_it() -> None:
    model = Network()
    norm = {"params": [model.norm.weight], "weight_decay": 0.0, "fallback_lr": 0.1}
    optimizer = SINGD(model, [norm, {"params": [model.shift], "weight_decay": 0.1}])
    assert [g["fallback_weight_decay"] for g in optimizer.param_groups] == [0.0, 0.01]
    model.norm.weight.grad = torch.zeros_like(model.norm.weight)
    optimizer.step()
    assert torch.equal(model.norm.weight, torch.ones(6))


@pytest.mark.parametrize("of_group", [True, False])
def test_an_explicit_decay_of_zero_holds_for_what_adamw_trains(of_group: bool) -> None:
    model, zero = Network(), {"weight_decay": 0.0}
    group: dict[str, Any] = {"params": list(model.parameters())}
    optimizer = SINGD(model, [group | zero]) if of_group else SINGD(model, **zero)
    assert optimizer.param_groups[0]["fallback_weight_decay"] == 0.0
    assert SINGD(model, weight_decay=0.1).param_groups[0]["fallback_weight_decay"] == 0.01
    both = SINGD(model, **zero, fallback_weight_decay=0.2)
    assert both.param_groups[0]["fallback_weight_decay"] == 0.2


def test_groups_have_settings_of_their_own() -> None:
    model = Network()
    rest = [p for n, p in model.named_parameters() if not n.startswith(("hidden", "out"))]
    optimizer = SINGD(
        model,
        [
            {
                "params": model.hidden.parameters(),
                "structures": ("diagonal", "dense"),
                "T": 2,
                "growing_T": False,
            },
            {"params": model.out.parameters(), "kfac": True, "lr": 1e-2},
            {"params": rest, "fallback_lr": 0.0, "lr": 0.0},
        ],
    )
    before = copy.deepcopy(model)
    for _ in range(3):
        step(model, optimizer)
    assert "K.diag" in optimizer.state[model.hidden.weight]
    assert "P_K.matrix" in optimizer.state[model.out.weight]
    assert optimizer.state[model.hidden.weight]["averages.k"] == 2
    assert optimizer.state[model.out.weight]["averages.k"] == 3
    still = {name for name, distance in moved(model, before).items() if distance == 0.0}
    assert still == {n for n, p in model.named_parameters() if any(p is q for q in rest)}


def test_add_param_group_trains_what_was_added() -> None:
    model = Network()
    optimizer = SINGD(model, model.hidden.parameters())
    before = copy.deepcopy(model)
    step(model, optimizer)
    changed = {n for n, distance in moved(model, before).items() if distance > 0.0}
    assert changed == {"hidden.weight", "hidden.bias"}
    factors = optimizer.state[model.hidden.weight]["K.matrix"].clone()

    optimizer.add_param_group({"params": model.out.weight, "structures": ("diagonal", "diagonal")})
    optimizer.add_param_group({"params": [model.shift], "fallback_lr": 0.1, "warmup": 0})
    assert torch.equal(optimizer.state[model.hidden.weight]["K.matrix"], factors)
    before = copy.deepcopy(model)
    step(model, optimizer)
    assert optimizer.state[model.hidden.weight]["averages.k"] == 2
    changed = {n for n, distance in moved(model, before).items() if distance > 0.0}
    assert changed == {"hidden.weight", "hidden.bias", "out.weight", "shift"}
    assert moved(model, before)["shift"] == pytest.approx(0.1, rel=1e-3)  # AdamW's first step


def test_a_bias_added_later_joins_its_layer() -> None:
    model = Network()
    optimizer = SINGD(model, [model.hidden.weight])
    step(model, optimizer)
    optimizer.add_param_group({"params": [model.hidden.bias]})
    before = copy.deepcopy(model)
    for _ in range(2):
        step(model, optimizer)
    changed = {n for n, distance in moved(model, before).items() if distance > 0.0}
    assert changed == {"hidden.weight", "hidden.bias"}
    assert optimizer.skipped == 0


def test_parameters_may_come_with_their_names() -> None:
    model = Network()
    before, optimizer = copy.deepcopy(model), SINGD(model, model.named_parameters())
    step(model, optimizer)
    assert min(moved(model, before).values()) > 0.0


# ---- schedules ---------------------------------------------------------------------------------


def test_the_rate_of_the_fallback_follows_the_schedule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = SINGD(model, lr=0.2, warmup=0, fallback_lr=0.1, fallback_weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x = torch.randn(9, 4)
    for factor in (1.0, 0.5, 0.25):
        before = model[1].bias.detach().clone()
        optimizer.zero_grad()
        (model(x).sum(1) * torch.arange(9.0)).mean().backward()
        optimizer.step()
        schedule.step()
        # the bias' gradient is constant, so each of AdamW's steps is its rate
        change = (model[1].bias - before).abs()
        torch.testing.assert_close(change, torch.full((4,), 0.1 * factor), rtol=1e-4, atol=0)


def rates_of_the_norm(given: dict[str, Any], rates: list[float | None]) -> list[float]:
    """How far a norm and a layer move at each of these rates; None leaves the rate as it is."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)), []
    optimizer = SINGD(model, **given)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    for rate in rates:
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        before = copy.deepcopy(model)
        step(model, optimizer, (x, y))
        data += moved(model, before).values()
    return data


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_rate_of_zero_moves_nothing_and_a_schedule_may_begin_at_it(
    zero: Any, recipe: str
) -> None:
    still = rates_of_the_norm({"lr": zero, "recipe": recipe}, [None, None])
    assert max(still) == 0.0
    rates: list[float | None] = [0.0, 1e-3, 2e-2, 0.0, 1e-2]
    begun_at_zero = rates_of_the_norm({"lr": zero, "recipe": recipe}, [None, *rates[1:]])
    assert begun_at_zero == rates_of_the_norm({"recipe": recipe}, rates)
    assert max(begun_at_zero[-6:]) > 0.0


def test_a_group_of_rate_zero_follows_the_rate_of_the_optimizer_when_it_rises() -> None:
    def change(of_norm: dict[str, Any]) -> float:
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        groups = [
            {"params": model[0].parameters()},
            {"params": model[1].parameters(), "fallback_weight_decay": 0.0, **of_norm},
        ]
        optimizer = SINGD(model, groups, lr=0.2, warmup=0, fallback_lr=0.1)
        optimizer.param_groups[1]["lr"] = 0.1
        model[1].bias.grad = torch.ones(4)
        optimizer.step()
        return model[1].bias.abs().max().item()

    assert change({"lr": 0.0}) == change({}) == pytest.approx(0.05, rel=1e-4)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=6),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.02, step_size_up=2),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_torch_work(schedule: str) -> None:
    model = Network()
    optimizer = SINGD(model)
    steps = SCHEDULES[schedule](optimizer)
    rates = set()
    for _ in range(5):
        step(model, optimizer)
        steps.step()
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1
    assert optimizer.skipped == 0


def test_plateau_schedule_works() -> None:
    model = Network()
    optimizer = SINGD(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        step(model, optimizer)
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.02


def test_a_rate_that_is_a_tensor_is_the_number_it_holds() -> None:
    model, data = Network(), [batch() for _ in range(4)]
    twin = copy.deepcopy(model)
    optimizers = SINGD(model, lr=torch.tensor(0.02)), SINGD(twin, lr=0.02)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
    for one in data:
        for net, optimizer, schedule in zip((model, twin), optimizers, schedules, strict=True):
            step(net, optimizer, one)
            schedule.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # 0.02 is rounded to float32 in one, and in float64 in the other
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


# ---- calls -------------------------------------------------------------------------------------


def test_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    expected = loss_of(twin, data).item()
    step(twin, other, data)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == expected
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert SINGD(nn.Linear(1, 1)).step() is None


def test_a_closure_may_evaluate_the_model_several_times() -> None:
    """As a line search does: the last evaluation decides the step."""
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)

    def closure() -> Tensor:
        for rows in (batch(), data):
            optimizer.zero_grad()
            loss = loss_of(model, rows)
            loss.backward()
        return loss

    optimizer.step(closure)
    step(twin, other, data)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_value_, nn.utils.clip_grad_norm_])
def test_clipped_gradients_are_those_that_are_stepped_along(clip: Any) -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    loss_of(model, data).backward()
    clip(model.parameters(), 1e-4)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    loss_of(twin, data).backward()
    for p, gradient in zip(twin.parameters(), clipped, strict=True):
        assert not torch.equal(p.grad, gradient)
        p.grad = gradient
    other.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_step_without_any_gradient_changes_nothing() -> None:
    model = Network()
    before, optimizer = copy.deepcopy(model), SINGD(model)
    optimizer.step()
    assert max(moved(model, before).values()) == 0.0
    step(model, optimizer)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    optimizer.step()
    assert max(moved(model, before).values()) == 0.0


def test_step_hooks_of_torch_are_called() -> None:
    model = Network()
    optimizer, calls = SINGD(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(model, optimizer)
    assert calls == ["before", "after"]


def test_zero_grad_may_keep_tensors() -> None:
    model = Network()
    optimizer = SINGD(model)
    step(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())
    optimizer.step()
    assert optimizer.skipped == 0


def test_gradients_are_left_as_they_were() -> None:
    model = Network()
    optimizer = SINGD(model, weight_decay=0.1)
    loss_of(model, batch()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_weights_stay_in_their_memory() -> None:
    """A view of a weight, or a flat buffer behind it, sees the steps."""
    model = Network()
    optimizer = SINGD(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    step(model, optimizer)
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_model_in_another_memory_format_trains_alike() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for net in (model, twin):
        optimizer, g = SINGD(net), torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(5, 3, 6, 6, generator=g)).sin().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("one", ["diagonal", "blockdiagonal:2", Diagonal, blockdiagonal(2)])
def test_one_structure_is_taken_for_both(one: Any) -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizers = SINGD(model, structures=one), SINGD(twin, structures=(one, one))
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        step(net, optimizer, data)
        optimizer.load_state_dict(optimizer.state_dict())
    assert repr(optimizers[0]) == repr(optimizers[1])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ---- the table ---------------------------------------------------------------------------------


def table(optimizer: SINGD) -> dict[str, list[str]]:
    _, header, *rows = repr(optimizer).splitlines()
    assert re.split(r"  +", header) == ["parameter", "shape", "rule", "K", "C", "bytes of state"]
    cells = [re.split(r"  +", row.strip()) for row in rows]
    return {name: rest for name, *rest in cells}


def test_print_shows_who_owns_each_parameter() -> None:
    model = Network()
    shown = table(SINGD(model, structures=("diagonal", "blockdiagonal:2")))
    assert list(shown) == [
        "embed.weight",
        "conv.weight + bias",
        "hidden.weight + bias",
        "out.weight",
        "shift",
        "norm.weight",
        "norm.bias",
    ]
    assert shown["hidden.weight + bias"][:-1] == ["8×6", "SINGD", "diagonal", "blockdiagonal:2"]
    assert shown["embed.weight"][:-1] == ["7×6", "SINGD", "diagonal", "blockdiagonal:2"]
    assert shown["norm.weight"][:-1] == ["6", "AdamW"]


STATES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper"},
    "no momentum": {"momentum": 0.0},
    "kfac": {"kfac": True},
    "factors of another dtype": {"preconditioner_dtype": (torch.bfloat16, torch.float64)},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:4", "blockdiagonal:3")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:2,3", "hierarchical15_15")},
    "rank one": {"structures": ("trilbottomrightdiag", "triutopleftdiag")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STATES)
def test_bytes_in_the_table_are_those_of_the_state(case: str, dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    optimizer = SINGD(model, **STATES[case])
    shown = table(optimizer)
    step(model, optimizer)
    assert table(optimizer) == shown
    for name, (*_, size) in shown.items():
        weight, *bias = name.split(" + ")
        names = [weight, *(weight.replace("weight", b) for b in bias)]
        entries = [e for n in names for e in optimizer.state[model.get_parameter(n)].items()]
        # the count of steps, the mean diagonals and the sums over late gradients are numbers
        numbers = "averages.", "late.", "step"
        arrays = [v for k, v in entries if not k.startswith(numbers)]
        assert int(size.replace(",", "")) == sum(a.numel() * a.element_size() for a in arrays), name


# ---- copies ------------------------------------------------------------------------------------


def test_warn_unsupported_names_what_adamw_trains() -> None:
    with pytest.warns(UserWarning, match=r"shift, norm\.weight, norm\.bias"):
        SINGD(Network(), warn_unsupported=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SINGD(Network())
        SINGD(nn.Linear(2, 2), warn_unsupported=True)


def test_arguments_of_the_authors_package_are_accepted_in_their_order() -> None:
    """`lr`, `momentum`, … by position, as singd 0.0.5 takes them."""
    model = nn.Linear(3, 2)
    optimizer = SINGD(
        model, None, 0.1, 0.8, 0.2, 0.3, 0.4, 5, None, 0.6, ("diagonal", "dense"), "reduce", False,
        False, (torch.float64, None), 4.0, True,
    )  # fmt: skip
    expected = {
        "lr": 0.1, "momentum": 0.8, "damping": 0.2, "alpha1": 0.3, "weight_decay": 0.4, "T": 5,
        "loss_average": None, "lr_cov": 0.6, "structures": ("diagonal", "dense"),
        "kfac_approx": "reduce", "rule": "singd", "preconditioner_dtype": (torch.float64, None),
        "normalize_lr_cov": True,
    }  # fmt: skip
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_compiled_by_an_old_torch_it_learns_from_gradients_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "SUPPORTED", False)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = SINGD(model)
    graph = torch.compile(model, backend="eager")
    before = copy.deepcopy(model)
    graph(torch.randn(5, 4)).sin().mean().backward()
    with pytest.warns(UserWarning, match="no rows of '0.weight' have been seen"):
        optimizer.step()
    assert min(moved(model, before).values()) > 0.0
    assert "SINGD without rows" in repr(optimizer)


def test_warnings_point_at_the_line_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = SINGD(model, warn_unsupported=True)
        (model(torch.randn(5, 4)) * float("nan")).sum().backward()
        optimizer.step()
    assert [w.filename for w in seen] == [__file__, __file__]
