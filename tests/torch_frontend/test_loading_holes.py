"""A checkpoint with a hole is an error that names it and changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import F32, Network, batches, deep_equal, train
from test_loading import saved_by

from singd_torch import SINGD


def entries_of(state: dict[str, Any], name: str) -> Any:
    """The saved state of a parameter of a Network."""
    return state["state"][[n for n, _ in Network().named_parameters()].index(name)]


def group_of(state: dict[str, Any]) -> Any:
    return state["param_groups"][0]


NAN = float("nan")
HOLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a moment is missing": (
        lambda s: entries_of(s, "scale").pop("exp_avg_sq"),
        "no 'exp_avg_sq' for 'scale'",
    ),
    "the other moment is missing": (
        lambda s: entries_of(s, "norm.bias").pop("exp_avg"),
        r"no 'exp_avg' for 'norm\.bias'",
    ),
    "a count is missing": (
        lambda s: entries_of(s, "norm.bias").pop("step"),
        r"no 'step' for 'norm\.bias'",
    ),
    "a count of words": (
        lambda s: entries_of(s, "norm.bias").update(step="3"),
        r"'step' of 'norm\.bias' is '3' in the checkpoint, not a tensor",
    ),
    "a moment of another shape": (
        lambda s: entries_of(s, "norm.bias").update(exp_avg_sq=torch.zeros(2)),
        r"'exp_avg_sq' of 'norm\.bias' has shape \(2,\) in the checkpoint, but \(16,\)",
    ),
    "a moment that is NaN": (
        lambda s: entries_of(s, "norm.bias")["exp_avg"].fill_(NAN),
        r"'exp_avg' of 'norm\.bias' is not finite",
    ),
    "a momentum is missing": (
        lambda s: entries_of(s, "hidden.bias").pop("momentum_buffer"),
        r"no 'momentum_buffer' for 'the bias of hidden\.weight'",
    ),
    "a sum over late gradients is missing": (
        lambda s: entries_of(s, "hidden.weight").pop("late.growth"),
        r"no 'late\.growth' for 'hidden\.weight'",
    ),
    "a sum over late gradients of another shape": (
        lambda s: entries_of(s, "hidden.weight").update({"late.squares": torch.zeros(3)}),
        r"'late\.squares' of 'hidden\.weight' has shape \(3,\) in the checkpoint, but \(\)",
    ),
    "a factor of integers": (
        lambda s: entries_of(s, "out.weight").update({"K.matrix": torch.eye(8).int()}),
        r"'K\.matrix' of 'out\.weight' is of torch\.int32",
    ),
    "a complex factor": (
        lambda s: entries_of(s, "out.weight").update({"K.matrix": torch.eye(8).cfloat()}),
        r"'K\.matrix' of 'out\.weight' is of torch\.complex64",
    ),
    "a factor that is NaN": (
        lambda s: entries_of(s, "out.weight")["C.matrix"].fill_(NAN),
        r"'C\.matrix' of 'out\.weight' is not finite",
    ),
    "T": (lambda s: group_of(s).update(T=0), r"parameter group 0 of the checkpoint: T=0: must be"),
    "lr": (
        lambda s: group_of(s).update(lr="0.1"),
        r"checkpoint: lr='0\.1': must be a number",
    ),
    "damping": (lambda s: group_of(s).update(damping=-3.0), r"damping=-3\.0: must be at least 0"),
    "structures": (
        lambda s: group_of(s).update(structures=("dense", "dens")),
        r'of the checkpoint: structures\[1\] = there is no structure "dens"',
    ),
    "betas": (lambda s: group_of(s).update(fallback_betas=(0.9, 2.0)), "fallback_betas=2"),
    "steps": (lambda s: group_of(s).update(steps=None), "steps=None: must be an integer of at"),
    "steps below 0": (lambda s: group_of(s).update(steps=-1), "steps=-1: must be an integer of at"),
    "base_lr": (lambda s: group_of(s).update(base_lr=NAN), "base_lr=nan: must be positive"),
    "largest_lr": (lambda s: group_of(s).update(largest_lr=-1.0), "largest_lr=-1.0: must be at"),
    "no largest_lr": (
        lambda s: group_of(s).update(largest_lr=None),
        "largest_lr=None: must be a number or a 0-d array, at least 0 and finite",
    ),
    "a largest_lr of words": (
        lambda s: group_of(s).update(largest_lr="0.1"),
        "largest_lr='0.1': must be a number or a 0-d array",
    ),
    "a largest_lr below 0": (
        lambda s: group_of(s).update(largest_lr=torch.tensor(-0.5)),
        r"largest_lr=-0\.5: must be at least 0",
    ),
    "a wrong switch": (lambda s: group_of(s).update(average_groups=1), "average_groups=1: must be"),
    "a rate that is no number": (
        lambda s: group_of(s).update(lr=torch.tensor(NAN)),
        "'lr' of parameter group 0 is not finite",
    ),
    "no parameters": (lambda s: group_of(s).pop("params"), "'params' of parameter group 0 is None"),
    "notes that are no text": (
        lambda s: group_of(s).update(layer_notes=None),
        "'layer_notes' of parameter group 0 is None in the checkpoint, not a text in JSON",
    ),
    "notes that are no list": (
        lambda s: group_of(s).update(layer_notes="{}"),
        r"'layer_notes' of parameter group 0 is {} in the checkpoint, not a sequence",
    ),
    "no notes of a parameter": (
        lambda s: group_of(s).update(layer_notes='[[0, "out.weight", null]]'),
        r"'layer_notes' of parameter group 0 has \[0, 'out.weight', None\] in the checkpoint, not",
    ),
    "a count that is none": (
        lambda s: group_of(s).update(layer_notes='[[0, "out.weight", {"missed": "2"}]]'),
        r"'layer_notes' of parameter group 0 has \[0, 'out.weight', {'missed': '2'}\] in the check",
    ),
    "a square below 0": (
        lambda s: entries_of(s, "norm.bias")["exp_avg_sq"].neg_(),
        r"'exp_avg_sq' of 'norm\.bias' is below 0",
    ),
    "a mean below 0": (
        lambda s: entries_of(s, "out.weight")["averages.t_U"].neg_(),
        r"'averages\.t_U' of 'out\.weight' is below 0",
    ),
    "a sum below 0": (
        lambda s: entries_of(s, "out.weight")["late.noise"].neg_(),
        r"'late\.noise' of 'out\.weight' is below 0",
    ),
    "a factor of eight bits": (
        lambda s: entries_of(s, "out.weight").update(
            {"K.matrix": torch.eye(8).to(torch.float8_e4m3fn)}
        ),
        r"'K\.matrix' of 'out\.weight' is of torch\.float8_e4m3fn",
    ),
    "a sparse momentum": (
        lambda s: entries_of(s, "out.weight").update(momentum_buffer=torch.eye(3, 8).to_sparse()),
        "'momentum_buffer' of parameter . is sparse",
    ),
    "a momentum without memory": (
        lambda s: entries_of(s, "out.weight").update(momentum_buffer=torch.eye(3, 8).to("meta")),
        "'momentum_buffer' of parameter . is without memory",
    ),
    "no entries": (
        lambda s: s["state"].update({0: None}),
        "the state of parameter 0 is None in the checkpoint, not a mapping",
    ),
    "a state that is a list": (lambda s: s.update(state=[]), r"'state' is \[\] in the checkpoint"),
    "groups that are none": (lambda s: s.update(param_groups=None), "'param_groups' is None"),
    "a group that is none": (lambda s: s.update(param_groups=[None]), "parameter group 0 is None"),
    "no state": (lambda s: s.pop("state"), "the checkpoint has no 'state': is it what"),
    "no groups": (lambda s: s.pop("param_groups"), "the checkpoint has no 'param_groups'"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_checkpoint_with_a_hole_is_named_and_changes_nothing(hole: str) -> None:
    damage, message = HOLES[hole]
    state = saved_by({"structures": "dense"})
    damage(state)
    model = Network()
    optimizer = SINGD(model)
    train(model, optimizer, batches(F32, 2))
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert deep_equal(optimizer.state_dict(), kept)
    train(model, optimizer, batches(F32, 1))
    assert optimizer.skipped == 0
