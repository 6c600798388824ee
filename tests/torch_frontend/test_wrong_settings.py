"""A setting that is wrong is named at once, also in a group and where a script changes it."""

import math
import re
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_network import INF, NAN, assert_same, everything, network, step
from torch import nn

from singd_torch import SINGD, estimate

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": "robsut"}, r"recipe='robsut': there are 'paper', 'normalized'"),
    "setting": (
        {"learning_rate": 0.1},
        r"'learning_rate' \(was 'lr' meant\?\); there are lr",
    ),
    "setting of AdamW": (
        {"betas": (0.9, 0.99)},
        r"'betas' \(b1 is 'momentum' here; AdamW's betas for the rest: 'fallback_betas'\)",
    ),
    "setting of AdamW that damps": (
        {"eps": 1e-8},
        r"'eps' \(of matrices it is 'damping' here; AdamW's epsilon for the rest: 'fallback_eps'",
    ),
    "setting of a kernel": ({"fused": True}, r"'fused' \(SINGD has none: leave it out\)"),
    "setting of a sign": ({"maximize": True}, r"'maximize' \(SINGD has none: negate the loss\)"),
    "setting with a slip": ({"nestrov": True}, r"no setting 'nestrov' \(was 'nesterov' meant\?\)"),
    "lr": ({"lr": -0.1}, r"lr=-0\.1: must be at least 0"),
    "lr, a word": ({"lr": "0.1"}, r"lr='0\.1': must be a number or a 0-d array, at least 0"),
    "lr, an array": ({"lr": torch.ones(1)}, r"lr=tensor\(\[1\.\]\): must be a number or a 0-d"),
    "lr, a tensor below 0": ({"lr": torch.tensor(-0.5)}, r"lr=-0\.5: must be at least 0"),
    "a tensor of NaN": ({"fallback_lr": torch.tensor(NAN)}, r"fallback_lr=nan: must be at least 0"),
    "lr, a switch": ({"lr": True}, r"lr=True: must be a number"),
    "nesterov": ({"nesterov": "yes"}, r"nesterov='yes': must be True or False"),
    "lr NaN": ({"lr": NAN}, r"lr=nan"),
    "lr infinite": ({"lr": INF}, r"lr=inf"),
    "momentum": ({"momentum": 1.0}, r"momentum=1\.0: must be in \[0, 1\)"),
    "negative momentum": ({"momentum": -0.1}, r"momentum=-0\.1"),
    "damping": ({"damping": -1e-3}, r"damping=-0\.001"),
    "alpha1": ({"alpha1": 1.5}, r"alpha1=1\.5"),
    "weight_decay": ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
    "lr_cov": ({"lr_cov": -0.1}, r"lr_cov=-0\.1"),
    "lr_cov beyond 1": ({"lr_cov": 1.5}, r"lr_cov=1\.5: must be in \[0, 1\], or a function"),
    "rows, a fraction": ({"rows": 1.5}, r"rows=1\.5: must be at least 1 and whole"),
    "rows, an array": ({"rows": torch.tensor(4.0)}, r"rows=tensor\(4\.\): must be a number"),
    "average_groups": ({"average_groups": "yes"}, "average_groups='yes': must be True or False"),
    "an infinite rate of AdamW": (
        {"fallback_lr": INF},
        "fallback_lr=inf: must be at least 0 and f",
    ),
    "T": ({"T": 0}, r"T=0: must be an integer of at least 1"),
    "T, a switch": ({"T": True}, r"T=True: must be an integer"),
    "T, a fraction": ({"T": 2.5}, r"T=2\.5"),
    "order": ({"order": 0}, r"order=0"),
    "factor_bound": ({"factor_bound": 0.0}, r"factor_bound=0\.0: must be positive"),
    "loss_average": ({"loss_average": "mean"}, r"loss_average = 'mean': choose 'batch'"),
    "kfac_approx": ({"kfac_approx": "shrink"}, r"kfac_approx = 'shrink': choose 'expand'"),
    "a budget of words": ({"structures": "auto:x"}, r'structures="auto:x": "auto:b" wants b >= 1'),
    "a budget of nothing": ({"structures": "auto:0"}, r'"auto:0": "auto:b" wants b >= 1'),
    "first structure": (
        {"structures": ("dens", "dense")},
        r'structures\[0\] = there is no structure "dens"; there are dense, diagonal',
    ),
    "second structure": (
        {"structures": ("dense", "hierarchical:0,4")},
        r'structures\[1\] = "hierarchical:0,4": k1 must be at least 1',
    ),
    "structure's parameter": (
        {"structures": ("blockdiagonal:x", "dense")},
        r'structures\[0\] = "blockdiagonal:x": expected "blockdiagonal:b" with integers',
    ),
    "one name": ({"structures": "dens"}, r'structures = there is no structure "dens"'),
    "no name": (
        {"structures": 3},
        r"structures=3: give two, one for K and one for C, or one for both",
    ),
    "three structures": ({"structures": ("dense",) * 3}, r"give two, one for K and one for C"),
    "KFAC with structure": (
        {"kfac": True, "structures": ("dense", "diagonal")},
        r'structures\[1\] = "diagonal": KFAC takes dense factors alone',
    ),
    "KFAC with one structure": (
        {"kfac": True, "structures": "diagonal"},
        r'structures = "diagonal": KFAC takes dense factors alone',
    ),
    "KFAC with a budget": (
        {"kfac": True, "structures": "auto:3"},
        r'structures="auto:3": KFAC takes dense factors alone',
    ),
    "one dtype of two": (
        {"preconditioner_dtype": (torch.float32,)},
        r"preconditioner_dtype=\(torch\.float32,\): give two",
    ),
    "one dtype": ({"preconditioner_dtype": torch.float32}, r"dtype=torch\.float32: give two"),
    "dtypes of integers": (
        {"preconditioner_dtype": (None, torch.int32)},
        r"give torch\.float64, torch\.float32, torch\.bfloat16, or None",
    ),
    "8 bits": (
        {"preconditioner_dtype": (torch.float8_e4m3fn, None)},
        r"give torch\.float64, torch\.float32, torch\.bfloat16, or None",
    ),
    "factors in float16": (
        {"preconditioner_dtype": (torch.float16, None)},
        r"give torch\.float64, torch\.float32, torch\.bfloat16, or None",
    ),
    "momenta in float16": ({"momentum_dtype": torch.float16}, "momentum_dtype=torch.float16: give"),
    "momenta of integers": (
        {"momentum_dtype": torch.int32},
        r"momentum_dtype=torch\.int32: give torch\.float64",
    ),
    "fallback_lr": ({"fallback_lr": -1.0}, r"fallback_lr=-1\.0: must be at least 0"),
    "fallback_betas": (
        {"fallback_betas": (0.9, 1.0)},
        r"fallback_betas=1\.0: must be two in",
    ),
    "one beta": ({"fallback_betas": 0.9}, r"fallback_betas=0\.9: give two numbers in \[0, 1\)"),
    "fallback_lr, a word": ({"fallback_lr": "x"}, r"fallback_lr='x': must be a number"),
    "fallback_eps": ({"fallback_eps": -1e-8}, r"fallback_eps"),
    "fallback_weight_decay": ({"fallback_weight_decay": -1.0}, r"fallback_weight_decay"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_named(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        SINGD(network(), **given)


OF_GROUPS = [case for case in WRONG if not case.startswith(("recipe", "setting"))]


@pytest.mark.parametrize("case", OF_GROUPS)
def test_a_wrong_setting_of_a_group_is_named(case: str) -> None:
    given, message = WRONG[case]
    model = network()
    with pytest.raises(ValueError, match=message):
        SINGD(model, [{"params": model[0].weight}, {"params": model[6].weight} | given])
    optimizer = SINGD(model, model[0].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[4].parameters()} | given)
    assert len(optimizer.param_groups) == 1


CHANGES = {
    "lr": (-0.1, r"lr=-0\.1: must be at least 0 and finite"),
    "momentum": ("0.9", "momentum='0.9': must be a number or a 0-d array"),
    "T": (0, "T=0: must be an integer of at least 1"),
    "fallback_lr": (math.nan, "fallback_lr=nan: must be at least 0 and finite"),
    "loss_average": ("mean", "loss_average = 'mean': choose"),
    "largest_lr": (None, "largest_lr=None: must be a number or a 0-d array, at least 0"),
    "base_lr": (-0.1, r"base_lr=-0\.1: must be positive and finite"),
    "steps": (None, "steps=None: must be an integer of at least 0"),
    "momentum_dtype": (torch.float64, r"momentum_dtype=torch\.float64: was None when the layers"),
    "preconditioner_dtype": (
        (torch.float64, torch.float64),
        r"preconditioner_dtype=\(torch\.float64, torch\.float64\): was \(None, None\) when",
    ),
    "structures": ("dense", r"structures='dense': was \('diagonal', 'dense'\) when the layers"),
    "normalized": (False, "normalized=False: was True when the layers were found"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_setting_that_a_script_changes_is_named_and_changes_nothing(name: str) -> None:
    (value, error), model = CHANGES[name], network()
    head = {"params": model[6].parameters()}
    optimizer = SINGD(
        model, [{"params": model[:6].parameters()}, head], structures=("diagonal", "dense")
    )
    step(model, optimizer)
    before, group = everything(model, optimizer), optimizer.param_groups[1]
    right, group[name] = group[name], value
    with pytest.raises(ValueError, match=f"^(parameter group 1: |){error}"):
        step(model, optimizer)
    assert_same(before, everything(model, optimizer))
    group[name] = right
    step(model, optimizer)


@pytest.mark.parametrize(
    ("rule", "before", "after", "error"),
    [
        ("singd", 0.0, 0.5, r"alpha1=0\.5: was 0\.0 when the layers were found"),
        ("singd", 0.9, 0.0, None),
        ("singd", 0.9, 0.5, None),
        ("ikfac", 0.0, 0.5, None),
    ],
)
def test_factors_get_no_momenta_later(
    rule: str, before: float, after: float, error: str | None
) -> None:
    model = network()
    optimizer = SINGD(model, rule=rule, alpha1=before)
    step(model, optimizer)
    optimizer.param_groups[0]["alpha1"] = after
    with nullcontext() if error is None else pytest.raises(ValueError, match=error):
        step(model, optimizer)
    optimizer.param_groups[0]["alpha1"] = after if error is None else before
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["lr", "momentum", "fallback_lr"])
def test_a_tensor_that_a_script_writes_to_is_checked_as_a_number_is(name: str) -> None:
    model, rate = network(), torch.tensor(0.1)
    optimizer = SINGD(model, **{name: rate})
    step(model, optimizer)
    before = everything(model, optimizer)
    rate.fill_(math.nan)
    with pytest.raises(ValueError, match=rf"parameter group 0: {name}=nan"):
        step(model, optimizer)
    rate.fill_(0.1)
    assert_same(before, everything(model, optimizer))
    step(model, optimizer)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "was 'lr' meant"),
        ("weight_decy", "was 'weight_decay' meant"),
        ("structure", "was 'structures' meant"),
        ("betas", "b1 is 'momentum' here"),
        ("amsgrad", "SINGD has none: leave it out"),
    ],
)
def test_a_key_of_a_group_that_may_be_meant_for_a_setting_is_warned_about(
    key: str, meant: str
) -> None:
    model = network()
    with pytest.warns(UserWarning, match=rf"'{key}', which is no setting.*{meant}"):
        optimizer = SINGD(model, [{"params": model.parameters(), key: 0.1}])
    assert optimizer.param_groups[0][key] == 0.1


@pytest.mark.parametrize("how", ["written", "in a copy"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("dampning", "was 'damping' meant"),
        ("betas", "b1 is 'momentum' here"),
        ("maximize", "SINGD has none: negate the loss"),
    ],
)
def test_such_a_key_that_a_script_writes_later_is_warned_about_once(
    key: str, meant: str, how: str
) -> None:
    model = network()
    optimizer = SINGD(model, [{"params": model.parameters(), "maximize": False}])
    step(model, optimizer)
    if how == "written":
        optimizer.param_groups[0][key] = 0.1
    else:
        optimizer.param_groups[0] = optimizer.param_groups[0] | {key: 0.1}
    with pytest.warns(UserWarning, match=rf"'{key}', which is no setting.*{meant}"):
        step(model, optimizer)
    step(model, optimizer)
    assert optimizer.param_groups[0][key] == 0.1


def test_keys_that_others_write_are_carried_along() -> None:
    model = network()
    optimizer = SINGD(model)
    step(model, optimizer)
    names = "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"
    for name in (*names, "name", "lr_scale", "layer_id", "weight_decay_scale", "foreach"):
        optimizer.param_groups[0][name] = None
        step(model, optimizer)
    assert optimizer.param_groups[0]["lr_scale"] is None


# Rates of the model, and of two groups; the largest that is given tells how they are meant.
@pytest.mark.parametrize(
    ("given", "of_groups", "warned"),
    [
        ({"lr": 1e-3}, [{}, {}], True),
        ({}, [{"lr": 3e-4}, {"lr": 1e-3}], True),
        ({}, [{}, {"lr": 1e-3}], True),
        ({}, [{"lr": 0.12}, {"lr": 1e-3}], False),  # layer by layer
        ({"lr": 0.003}, [{}, {}], False),
        ({}, [{}, {"lr": 0.0}], False),
        ({"lr": torch.tensor(1e-3)}, [{}, {}], False),
        ({"lr": 1e-3, "recipe": "paper"}, [{}, {}], False),
        ({}, [{}, {"lr": 1e-3, "normalized": False}], False),
    ],
)
def test_a_rate_of_adamw_is_warned_about(
    given: dict[str, Any], of_groups: list[dict[str, Any]], warned: bool
) -> None:
    model = network()
    parts = [
        {"params": model[i].parameters()} | own for i, own in zip((0, 4), of_groups, strict=True)
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SINGD(model, parts, **given)
    text = r"lr=0\.001: here the rate is the size of a step.* default is 0\.12: leave the rate out"
    assert [re.match(text, str(w.message)) is not None for w in seen] == [True] * warned
    assert [w.filename for w in seen] == [__file__] * warned


@pytest.mark.parametrize(
    ("given", "rates", "warned"),
    [
        ({}, [6e-4], True),  # a script that writes AdamW's rate to the groups
        ({}, [0.0, 1e-3], True),  # a schedule
        ({}, [1e-3, 0.12], False),
        ({"lr": 1e-3}, [1e-3], False),  # it was said at the start
        ({"recipe": "paper"}, [1e-3], False),
    ],
)
def test_rates_of_adamw_that_come_later_are_warned_about_once(
    given: dict[str, Any], rates: list[float], warned: bool
) -> None:
    model = nn.Linear(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SINGD(model, **given)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(230):
            optimizer.param_groups[0]["lr"] = rates[i % len(rates)]
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert [str(w.message).partition(":")[0] for w in seen] == warned * [
        f"the largest rate of the first 200 steps was lr={max(rates)}"
    ]


@pytest.mark.parametrize("largest", [1e-3, 0.12])
def test_the_largest_rate_of_one_cycle_is_warned_of_at_once(largest: float) -> None:
    model = nn.Linear(2, 1)
    optimizer = SINGD(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, largest, total_steps=300, cycle_momentum=False
    )
    seen = []
    for i in range(230):
        with warnings.catch_warnings(record=True) as new:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            schedule.step()
        seen += [(i, str(w.message).partition(":")[0]) for w in new]
    assert seen == [(0, "the largest rate of the schedule is lr=0.001")] * (largest == 1e-3)


def test_a_group_that_is_refused_later_leaves_the_optimizer_as_it_was() -> None:
    """AdamW trained all there was so far."""
    scale = nn.Parameter(torch.ones(3))
    optimizer = SINGD([scale])
    group = {"params": [nn.Parameter(torch.ones(4, 5))], "structures": "auto"}
    with pytest.raises(ValueError, match="it is decided at construction"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    scale.grad = torch.ones(3)
    optimizer.step()
    assert (scale != 1.0).all()


def test_compiled_steps_may_have_no_options() -> None:
    assert SINGD(nn.Linear(2, 2), compile_step={})._stepper.compile == {}


def test_who_may_shard_is_said() -> None:
    with pytest.raises(ValueError, match="Leave shard out for a model in parts"):
        SINGD(nn.Linear(2, 2), shard=True)


def test_switches_of_other_optimizers_that_are_off_are_carried_along() -> None:
    model = network()
    group = {"params": model.parameters(), "fused": None, "maximize": False}
    assert SINGD(model, [group]).param_groups[0]["maximize"] is False


def test_an_estimate_takes_and_checks_the_settings_of_groups() -> None:
    model = network()
    assert estimate(model, fallback_lr=0.1).total == estimate(model).total
    for given, message in WRONG.values():
        with pytest.raises(ValueError, match=message):
            estimate(model, **given)
