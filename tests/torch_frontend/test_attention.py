"""The projections inside attention's fused call are preconditioned from their true rows."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from watched import CLOSE, Watched, check_products, layers

from singd_torch import SINGD
from singd_torch.capture.attention import _Fused


def attention(**kwargs: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(batch_first: bool, need_weights: bool, bias: bool) -> None:
    model = attention(batch_first=batch_first, bias=bias)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    optimizer = Watched(model)
    model(x, x, x, need_weights=need_weights)[0].sin().mean().backward()
    found = layers(optimizer)
    assert len(found) == 2
    check_products(optimizer)
    terms = {pending.M_now for layer in found for pending in layer.pending.values()}
    assert terms == {5 if batch_first else 4}  # the batch, wherever its axis is


def test_cross_attention_of_other_length() -> None:
    model = attention(batch_first=True)
    q, k = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 7, 6, dtype=torch.float64)
    optimizer = Watched(model)
    model(q, k, k + 1.0)[0].sin().mean().backward()
    check_products(optimizer)
    assert {key: pending.N for key, pending in layers(optimizer)[0].pending.items()} == {
        (0, False): 12,
        (1, False): 21,
        (2, False): 21,
    }


def test_keys_and_values_of_other_width() -> None:
    model = attention(batch_first=True, kdim=3, vdim=5)
    q, k, v = (torch.randn(3, 4, d, dtype=torch.float64) for d in (6, 3, 5))
    optimizer = Watched(model)
    model(q, k, v)[0].sin().mean().backward()
    assert len(layers(optimizer)) == 4
    check_products(optimizer)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_are_unchanged_and_explained(layer: Any) -> None:
    model = layer(6, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    plain = copy.deepcopy(model)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    optimizer = Watched(model)
    for m in (model, plain):
        (m(x) if isinstance(m, nn.TransformerEncoderLayer) else m(x, x)).sin().mean().backward()
    check_products(optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() <= CLOSE * q.grad.norm()


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_the_batch_may_be_the_second_axis(layer: Any, kfac_approx: str) -> None:
    """As it is by default: the feed-forward layers would take the sequence for the batch."""
    models = [layer(6, 2, 8, dropout=0.0, batch_first=first).double() for first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    for model, own in zip(models, (x, x.transpose(0, 1)), strict=True):
        optimizer = SINGD(model, kfac_approx=kfac_approx, recipe="paper")
        args = (own,) if layer is nn.TransformerEncoderLayer else (own, own)
        model(*args).sin().mean().backward()
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (p - q).norm() <= CLOSE * p.norm()


def test_a_projection_whose_output_has_no_gradient_has_no_rows() -> None:
    """As in a pointer network, whose loss is of the attention weights alone."""
    model = attention(batch_first=True)
    optimizer = SINGD(model, T=1, growing_T=False, weight_decay=0.0)
    before = model.in_proj_weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        model(x, x, x)[1][..., 0].square().sum().backward()
        optimizer.step()
    assert optimizer.skipped == 0
    moved = (model.in_proj_weight - before).unflatten(0, (3, -1)).abs().amax((1, 2))
    assert (moved > 0.0).tolist() == [True, True, False]


def test_nothing_is_intercepted_between_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = attention(batch_first=True), torch.randn(2, 3, 6, dtype=torch.float64)
    optimizer = SINGD(model, T=2, growing_T=False)
    entered = 0

    def enter(self: _Fused) -> Any:
        nonlocal entered
        entered += 1
        return original(self)

    original = _Fused.__enter__
    monkeypatch.setattr(_Fused, "__enter__", enter)
    for expected in (1, 1, 2):
        model(x, x, x)[0].sin().mean().backward()
        optimizer.step()
        assert entered == expected


def test_an_error_in_the_call_leaves_no_mode_behind() -> None:
    model = attention(batch_first=True)
    optimizer = SINGD(model)
    bad = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)):
        model(bad, bad, bad)
    assert torch.overrides._get_current_function_mode() is None
    del optimizer


def test_a_copy_of_the_model_is_not_watched() -> None:
    model = attention(batch_first=True)
    optimizer = SINGD(model)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    copy.deepcopy(model)(x, x, x)[0].mean().backward()
    assert not any(layer.pending for layer in layers(optimizer))


def test_it_trains_and_every_parameter_moves() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SINGD(model)
    x = torch.randn(16, 5, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_empty_batch_goes_through_attention() -> None:
    """As where one of several processes has no samples: torch takes it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = SINGD(layer, T=1)
    for n in (0, 3):
        optimizer.zero_grad()
        x = torch.randn(n, 5, 8, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        optimizer.step()
    assert "without rows" not in str(optimizer)
