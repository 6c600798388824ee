"""Any scale of the loss, also in float16: it is divided out, and changes no step of a layer."""

import pytest
import torch
from test_grad_scaler import SCALE, batches, loss_of, network, plainly
from torch import nn

from singd_torch import SINGD
from singd_torch.tensors import pieces


def test_the_square_of_a_scale_may_leave_float32() -> None:
    """2¹²⁸ does; the rows, scaled by 2⁶⁴, do not."""
    plain, model = network(), network()
    model.load_state_dict(plain.state_dict())
    data = batches(3)
    plainly(plain, data)
    optimizer, amp = SINGD(model), torch.amp.GradScaler("cpu", init_scale=2.0**64)
    for batch in data:
        optimizer.zero_grad()
        amp.scale(loss_of(model, batch)).backward()
        amp.step(optimizer)
        amp.update()
    assert optimizer.skipped == 0
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # 2⁻¹²⁸ has two bits less


@pytest.mark.parametrize("masked", [False, True], ids=["host", "accelerator"])
def test_models_of_float16_train_at_any_scale(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and rows are in float16; scales that are powers of two change nothing.

    Sums of rows and the factors are in float32, and steps do not depend on the scale of the loss.
    """
    if masked:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    data, found = batches(6), []
    for scale in (1.0, 64.0):
        torch.manual_seed(0)
        model = network().half()
        optimizer = SINGD(model, warmup=0)
        for x, y in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.half()).float(), y)
            (loss * scale).backward()
            optimizer.set_current_grad_scale(scale)
            optimizer.step()
        assert optimizer.skipped == 0
        found.append(model)
    for p, q in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert p.dtype == torch.float16
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3)  # gradients near the least numbers


@pytest.mark.parametrize("told", [True, False], ids=["told", "unknown"])
def test_steps_of_layers_do_not_depend_on_a_scale_of_the_loss(told: bool) -> None:
    """With the default rule a scale that nobody tells changes nothing either, factors included.

    The factors start at the scale of the first curvature, their damping is a share of it, and a
    step has a size of its own. So they need no scaler; AdamW, for vectors, divides by √v.
    """
    data, found = batches(6), []
    for scale in (1.0, SCALE):
        torch.manual_seed(0)
        model = network()
        optimizer = SINGD(model, fallback_eps=0.0)
        for batch in data:
            optimizer.zero_grad()
            (loss_of(model, batch) * scale).backward()
            if told:
                optimizer.set_current_grad_scale(scale)
            optimizer.step()
        found.append((model, optimizer))
    (model, optimizer), (other, _) = found
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    first = optimizer.state[model[0].weight], found[1][1].state[other[0].weight]
    share = 1.0 if told else SCALE  # C Cᵀ is the inverse of what grows with the scale's square
    torch.testing.assert_close(
        first[0]["C.matrix"], first[1]["C.matrix"] * share, rtol=1e-3, atol=1e-5
    )
