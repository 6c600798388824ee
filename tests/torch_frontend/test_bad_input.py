"""Wrong arguments are named at once, and wrong numbers do no harm."""

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import table

from singd_torch import SINGD, estimate
from singd_torch.tensors import pieces

INF, NAN = float("inf"), float("nan")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2),
        nn.Flatten(), nn.Linear(9, 3),
    )  # fmt: skip


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), torch.arange(len(x)) % 3)


def step(model: nn.Module, optimizer: SINGD, x: Tensor | None = None) -> None:
    optimizer.zero_grad()
    loss_of(model, torch.randn(9, 6) if x is None else x).backward()
    optimizer.step()


# ---- arguments ---------------------------------------------------------------------------------

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
        r"give torch\.float64, torch\.float32, torch\.bfloat16, torch\.float16, or None",
    ),
    "8 bits": (
        {"preconditioner_dtype": (torch.float8_e4m3fn, None)},
        r"give torch\.float64, torch\.float32, torch\.bfloat16, torch\.float16, or None",
    ),
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
    "structures": ("dense", r"structures='dense' was \('diagonal', 'dense'\) when the layers"),
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


@pytest.mark.parametrize("value", [1e-3, "sgd", 3, None])
def test_what_is_given_in_place_of_parameters_is_named(value: Any) -> None:
    """A rate above all, which comes second in every other optimizer."""
    model = network()
    with pytest.raises(TypeError, match="params must be parameters or groups of them, not"):
        SINGD(model, value) if value is not None else SINGD(model, [{"params": None}])
    for given in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"SINGD\(model, lr=0\.001\)"):
            SINGD(given, 1e-3)


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


def test_switches_of_other_optimizers_that_are_off_are_carried_along() -> None:
    model = network()
    group = {"params": model.parameters(), "fused": None, "maximize": False}
    assert SINGD(model, [group]).param_groups[0]["maximize"] is False


def test_a_set_of_parameters_is_refused() -> None:
    model = network()
    for params in (set(model.parameters()), [{"params": set(model.parameters())}]):
        with pytest.raises(TypeError, match="in a set, whose order changes between runs"):
            SINGD(model, params)


def test_a_budget_of_nothing_that_asks_for_one_is_named() -> None:
    model = network()
    for function in (SINGD, estimate):
        with pytest.raises(ValueError, match='memory_budget=10 is for structures="auto" alone'):
            function(model, memory_budget=10)


def test_an_estimate_takes_and_checks_the_settings_of_groups() -> None:
    model = network()
    assert estimate(model, fallback_lr=0.1).total == estimate(model).total
    for given, message in WRONG.values():
        with pytest.raises(ValueError, match=message):
            estimate(model, **given)


def test_a_parameter_given_twice_is_an_error() -> None:
    model = network()
    p = model[0].weight
    with pytest.raises(ValueError, match="twice"):
        SINGD(model, [p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        SINGD(model, [{"params": [p]}, {"params": [p]}])
    optimizer = SINGD(model, [p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


def test_a_parameter_that_is_not_of_the_model_is_trained_by_adamw() -> None:
    """Such as a temperature that belongs to the loss."""
    model, temperature = network(), nn.Parameter(torch.ones(1))
    optimizer = SINGD(model, [*model.parameters(), temperature])
    (model(torch.randn(4, 6)) * temperature).square().mean().backward()
    optimizer.step()
    assert temperature.item() != 1.0
    assert "(not of the model)" in repr(optimizer)


@pytest.mark.parametrize("model", [nn.Tanh(), nn.Linear(3, 2).requires_grad_(False)])
def test_a_model_with_nothing_to_train_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        SINGD(model)


def test_no_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        SINGD(network(), [])


@pytest.mark.parametrize("model", [None, "model", 3])
def test_something_that_is_no_model_is_an_error(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, or the parameters"):
        SINGD(model)


def test_modules_in_place_of_parameters_are_an_error() -> None:
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        SINGD([nn.Linear(1, 1)])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_parameter_without_a_shape_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: call the model once"):
        SINGD(model)
    model(torch.zeros(1, 4))
    names = [name for name, _ in model.named_parameters()]
    assert table(SINGD(model)) == dict.fromkeys(names, "SINGD")


def test_data_parallel_is_an_error() -> None:
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        SINGD(nn.DataParallel(network()))


# ---- numbers -----------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 1, "damping": 0.1, "weight_decay": 0.01},
    "normalized lr_cov": {"recipe": "paper", "T": 1, "normalize_lr_cov": True},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:3", "blockdiagonal:2")},
    "triangular": {"structures": ("tril", "triu")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:2,2", "hierarchical:1,1")},
}


def everything(model: nn.Module, optimizer: SINGD) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} | {k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def poison_input(model: nn.Module, value: float) -> None:
    x = torch.randn(9, 6)
    x[3, 2] = value
    loss_of(model, x).backward()


def poison_gradient(index: int, name: str) -> Callable[[nn.Module, float], None]:
    def poison(model: nn.Module, value: float) -> None:
        loss_of(model, torch.randn(9, 6)).backward()
        getattr(model[index], name).grad.flatten()[-1] = value

    return poison


def poison_row(index: int, of_output: bool) -> Callable[[nn.Module, float], None]:
    """Gradients stay finite: the row alone is not."""

    def poison(model: nn.Module, value: float) -> None:
        (hook,) = model[index]._forward_hooks.values()
        rows = hook._owner().rows_wanted(hook.source)
        x, z = {0: ((9, 6), (9, 8)), 4: ((9, 2, 4), (9, 3, 3)), 6: ((9, 9), (9, 3))}[index]
        x, z = torch.randn(x), torch.randn(z)
        (z if of_output else x).view(-1)[5] = value

        def one_more(_: Tensor) -> None:
            rows(x, z, None, None)

        handle = model[index].weight.register_hook(one_more)
        loss_of(model, torch.randn(9, 6)).backward()
        handle.remove()

    return poison


# What is done, and what the warning says of it.
POISONS = {
    "an input": (
        poison_input,
        r"the gradients of '0\.weight', '0\.bias' and \d+ more",
    ),
    "gradient of a weight": (poison_gradient(0, "weight"), r"the gradient of '0\.weight'"),
    "gradient of a bias": (poison_gradient(6, "bias"), r"the gradient of '6\.bias'"),
    "gradient of a convolution": (poison_gradient(4, "weight"), r"the gradient of '4\.weight'"),
    "gradient of a fallback parameter": (
        poison_gradient(1, "weight"),
        r"the gradient of '1\.weight'",
    ),
    "row of an input": (poison_row(6, False), r"the curvature of '6\.weight'"),
    "row of an output": (poison_row(0, True), r"the curvature of '0\.weight'"),
    "row of a convolution": (poison_row(4, True), r"the curvature of '4\.weight'"),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_changes_nothing_is_counted_and_warned_about_once(
    poison: str, value: float
) -> None:
    model = network()
    optimizer = SINGD(model)
    for _ in range(2):
        step(model, optimizer)
    before = everything(model, optimizer)
    spoil, named = POISONS[poison]
    warning = pytest.warns(
        UserWarning, match=f"^{named} (was|were) NaN or infinite: the step changed"
    )
    for count, expectation in ((1, warning), (2, None)):
        optimizer.zero_grad()
        spoil(model, value)
        if expectation is None:
            optimizer.step()  # a second warning would be an error
        else:
            with expectation as caught:
                optimizer.step()
            assert len(caught) == 1
        assert optimizer.skipped == count
        assert_same(before, everything(model, optimizer))
    step(model, optimizer)  # goes on
    assert optimizer.skipped == 2
    after = everything(model, optimizer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after["0.weight"], before["0.weight"])


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_rule_and_structure_survives_nan(case: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = SINGD(model, **CASES[case])
    poisoned = torch.randn(9, 6, dtype=dtype)
    poisoned[0, 0] = NAN
    step(model, optimizer, poisoned)  # before any state
    for _ in range(2):
        step(model, optimizer, torch.randn(9, 6, dtype=dtype))
    before = everything(model, optimizer)
    step(model, optimizer, poisoned)
    assert_same(before, everything(model, optimizer))
    step(model, optimizer, torch.randn(9, 6, dtype=dtype))
    assert optimizer.skipped == 2
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def test_a_skipped_step_is_a_step_for_the_schedule_of_refreshes() -> None:
    model = network()
    optimizer = SINGD(model, T=2, growing_T=False)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        step(model, optimizer, torch.full((9, 6), NAN))
    assert optimizer.param_groups[0]["steps"] == 1


def test_rows_that_overflow_are_not_finite() -> None:
    """Inputs of 1e25 have a float32 square of infinity, and a gradient that is finite."""
    model = nn.Linear(6, 3)
    optimizer = SINGD(model)
    x = torch.randn(9, 6)
    step(model, optimizer, x)
    before = everything(model, optimizer)
    optimizer.zero_grad()
    (model(x * 1e25) * 1e-27).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.warns(UserWarning, match="NaN or infinite"):
        optimizer.step()
    assert_same(before, everything(model, optimizer))


@pytest.mark.filterwarnings("ignore:the squared gradients of '0.weight'")
@pytest.mark.parametrize("size", [1e15, 1e17, 1e19])
@pytest.mark.parametrize("host", [True, False], ids=["host", "accelerator"])
def test_gradients_whose_squares_leave_the_range_change_nothing(
    size: float, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of squares of late gradients leave it before a square does."""
    monkeypatch.setattr(pieces, "on_host", lambda x: host)
    model = network()
    optimizer, large = SINGD(model), 6
    step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(large):
        optimizer.zero_grad()
        loss_of(model, torch.randn(9, 6)).backward()
        for p in model.parameters():
            p.grad *= size / p.grad.norm()  # type: ignore[operator]
        optimizer.step()
    unchanged = all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert (unchanged, int(optimizer.skipped)) == ((False, 0) if size < 1e16 else (True, large))
    step(model, optimizer)
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert all(value.isfinite().all() for value in everything(model, optimizer).values())


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_does_no_harm(case: str) -> None:
    model = network()
    optimizer = SINGD(model, **CASES[case])
    step(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(0, 6)).sum().backward()  # zeros
    optimizer.step()
    optimizer.zero_grad()
    loss = model(torch.randn(0, 6)).mean()  # of nothing: NaN
    (loss + sum(p.sum() for p in model.parameters()) * loss).backward()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        optimizer.step()
    step(model, optimizer)
    assert optimizer.skipped == 1
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


@pytest.mark.filterwarnings("ignore:no rows of")
def test_empty_first_batch_does_no_harm() -> None:
    model = network()
    optimizer = SINGD(model)
    model(torch.randn(0, 6)).sum().backward()
    optimizer.step()
    step(model, optimizer)
    assert optimizer.skipped == 0
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def losses(model: nn.Module, optimizer: SINGD, n: int = 30) -> list[float]:
    x, found = torch.randn(9, 6).to(model[0].weight.dtype), []
    for _ in range(n):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_head_that_starts_at_zero(case: str, dtype: torch.dtype) -> None:
    """It sends no gradient down in the first step: rows of zeros for every layer below it."""
    model = network()
    nn.init.zeros_(model[6].weight)
    nn.init.zeros_(model[6].bias)
    before = copy.deepcopy(model).to(dtype)
    optimizer = SINGD(model.to(dtype), **CASES[case])
    found = losses(model, optimizer)
    assert optimizer.skipped == 0
    assert found[-1] < found[0]
    assert not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("case", CASES)
def test_layer_that_is_dead_from_the_start_and_one_that_dies(case: str) -> None:
    model = network()
    model.add_module("7", nn.Linear(3, 3))
    kill = {"now": True}
    model[3].register_forward_hook(lambda m, args, out: out * 0.0 if kill["now"] else None)
    optimizer = SINGD(model, **CASES[case])
    for now in (True, False, True, False):  # inputs of zero above, gradients of zero below
        kill["now"] = now
        for _ in range(4):
            step(model, optimizer)
            assert optimizer.skipped == 0
            state = everything(model, optimizer)
            assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("scale", [1e-8, 1e-12, 1e-16, 1e-20, 1e-24])
def test_tiny_gradients_skip_no_step(scale: float) -> None:
    """Their squares leave the range of float32 on the way down."""
    model = network()
    optimizer = SINGD(model)
    for _ in range(5):
        optimizer.zero_grad()
        (loss_of(model, torch.randn(9, 6)) * scale).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def test_sparse_gradient_is_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = SINGD(model)
    loss_of(model, torch.arange(5)).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"gradient of '0\.weight' is sparse"):
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p)


def test_warning_names_the_line_of_the_user() -> None:
    model = nn.Linear(2, 2)
    optimizer = SINGD(model)
    model(torch.full((3, 2), NAN)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == 1
