"""What every torch optimizer does, and users rely on."""

import copy
from typing import Any

import pytest
import torch
from contract_runs import Network, moved, step
from torch import Tensor, nn

from singd_torch import SINGD


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
