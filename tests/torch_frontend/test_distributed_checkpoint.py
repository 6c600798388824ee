"""torch.distributed.checkpoint: the state of model and optimizer, by the names of parameters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import F32, Network, all_numbers, assert_equal, batches, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from singd_torch import SINGD

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def save(model: nn.Module, optimizer: SINGD, folder: Path, options: StateDictOptions) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: SINGD, folder: Path, options: StateDictOptions) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


class Tied(nn.Module):
    """A table tied to the head, and a frozen weight with a trained bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 16)
        self.middle = nn.Linear(32, 16)
        self.middle.weight.requires_grad_(False)
        self.head = nn.Linear(16, 3, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = self.table((x[:, 0, 0, 0] > 0).long())
        return self.head(torch.tanh(self.middle(x.flatten(1)) + known))


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "normalized": (Network, {}),
    "paper": (Network, {"recipe": "paper", "T": 2}),
    "kfac without momentum": (Network, {"kfac": True, "momentum": 0.0}),
    "structures": (Network, {"structures": ("hierarchical:2,3", "triltoeplitz")}),
    "tied and frozen": (Tied, {}),
}


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_from_a_distributed_checkpoint_is_the_uninterrupted_one(
    case: str, before: int, flat: bool, tmp_path: Path
) -> None:
    make, given = CASES[case]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    data = batches(F32, before + 3)
    model = make()
    optimizer = SINGD(model, **given)
    train(model, optimizer, data[:before])
    save(model, optimizer, tmp_path, options)
    train(model, optimizer, data[before:])

    resumed = make()
    again = SINGD(resumed, **given)
    load(resumed, again, tmp_path, options)
    train(resumed, again, data[before:])
    assert_equal(all_numbers(model, optimizer), all_numbers(resumed, again))


def test_asking_for_the_state_before_the_first_step_changes_no_step() -> None:
    model, data = Network(), batches(F32, 4)
    plain = copy.deepcopy(model)
    optimizer, alone = SINGD(model, T=2, growing_T=False), SINGD(plain, T=2, growing_T=False)
    get_state_dict(model, optimizer)
    train(model, optimizer, data)
    train(plain, alone, data)
    assert_equal(all_numbers(model, optimizer), all_numbers(plain, alone))
