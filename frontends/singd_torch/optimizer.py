"""SINGD as a torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from singd_core._recipes import (
    DEFAULT,
    RECIPES,
    STRUCTURES,
    check_names,
    fallback_of,
    settings,
    small_step,
    with_rule,
)
from singd_core._settings import is_zero, plain
from singd_core._warnings import warn
from singd_core.rounding import format_of
from singd_core.structures import choose
from singd_torch import _diagnostics, _table
from singd_torch._distributed import group_of, unwrapped
from singd_torch._estimate import automatic
from singd_torch._groups import bare, check_counts, check_group, check_keys, parameters_of
from singd_torch._saving import Saving
from singd_torch.capture.scaling import takes_scale
from singd_torch.layers.find import by_choice
from singd_torch.layers.kinds import reasons
from singd_torch.layers.matrices import without_model
from singd_torch.layers.reach import part_again
from singd_torch.sharding.guards import check_model, refuse_zero_redundancy


class SINGD(Saving):
    """Structured inverse-free natural gradient descent (arXiv 2312.05705) for any model.

    Structured factors of the inverse Fisher matrix precondition the weights of linear layers,
    convolutions, embeddings and attention's projections, with their biases. Other matrices, such as
    recurrent weights, learn their factors from gradients alone. With the recipe "paper" they do
    not. AdamW trains the rest. `print(optimizer)` shows what trains each parameter.

    The arguments up to `normalize_lr_cov` have the names of the authors' package, `singd` 0.0.5.
    The recipe gives a value to every setting that is None.

    Args:
        model: The model. The optimizer watches its layers to learn their inputs and output
            gradients. Or parameters alone, as any optimizer takes them. Then all parameters learn
            from their gradients.
        params: The parameters to train, or groups of them. None is all that require a gradient.
        lr: Learning rate (β₂): the size of a step of each matrix, relative to its width and inputs
            (5.10). None is 0.12. With "paper" None is 0.001, and the rate multiplies the natural
            gradient (5.14). Numbers in brackets are equations of docs/mathematics.md.
        momentum: Momentum of the weights (α₂).
        damping: Damping (λ).
        alpha1: Riemannian momentum of the factors (α₁), for the rule "singd".
        weight_decay: Weight decay (γ) of the preconditioned weights.
        T: Steps between two refreshes of the factors.
        loss_average: What the loss is a mean of: "batch", "batch+sequence", a number of terms, or
            None for a sum.
        lr_cov: Step size of the factors (β₁), or a function of the number of steps taken.
        structures: Structures of the factors K (inputs) and C (outputs), or one for both, by name
            or class. None is dense for the recipe "paper". Otherwise None is "cost:512": the
            richest structures that cost little beside a step with 512 rows and hold no more numbers
            than the weight. "auto" is the richest structures that fit the memory budget.
        kfac_approx: "expand" or "reduce": how positions that share the weight are treated.
        warn_unsupported: Warn with the names of the parameters that AdamW trains.
        kfac_like: The authors' name for `rule="ikfac"` (True) and `rule="singd"` (False).
        preconditioner_dtype: Dtypes of K and of C. None is the weight's, and float32 for float16.
        init_grad_scale: Accepted for compatibility. It is not used: a step reads the scale itself.
        normalize_lr_cov: The authors' normalization of the factor step.
        recipe: "normalized" or "paper": the values of all settings that are not given.
        memory_budget: With `structures="auto"`, the bytes that all of the state may take.
        momentum_dtype: Dtype of layers' momenta. None is the weight's, and float32 for float16.
        kfac: Another name for `rule="kfac"`, KFAC with its inverses.
        average_groups: Average the groups of a grouped convolution, as the authors do. Otherwise
            each group has exact factors.
        compile_step: Run the mathematics of the step through torch.compile. Give True, or arguments
            of torch.compile, such as {"mode": "max-autotune-no-cudagraphs"}. It needs torch 2.13.
        capturable: Let CUDA graphs hold steps between two refreshes (`replayable`). Rates are then
            tensors, which torch's schedules change in place.
        fallback_lr: AdamW's rate. None is the rate of the recipe. It follows `lr`: a schedule that
            halves one halves the other.
        fallback_betas: AdamW's betas.
        fallback_eps: AdamW's epsilon.
        fallback_weight_decay: AdamW's weight decay. None is 0.01, or 0 if `weight_decay=0.0` is
            given.
        processes: The processes that train copies of the model, if your own loop averages their
            gradients. With a DistributedDataParallel wrapper you need not give them.
        shard: Split state and work among processes that have copies of the model: each steps some
            layers and sends their changes to all. Models in parts always do so.
        gradients: How several processes join their gradients: the "mean", as wrappers do, or
            the "sum", as after `set_gradient_divide_factor(1.0)`.
        **given: Any further setting of `singd_core.Settings`, e.g. `rule="singd"`.

    Raises:
        TypeError: If `model` is neither a module nor parameters, `params` are no parameters, or a
            wrapper such as DataParallel is not supported.
        ValueError: If a setting or a name is wrong, a parameter is given twice, or there is
            nothing to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> optimizer = SINGD(model, structures=("diagonal", "dense"))
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
    """

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler is to hand over its scale: the one who asks is told."""
        return takes_scale()

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        lr: Any = None,
        momentum: Any = None,
        damping: Any = None,
        alpha1: Any = None,
        weight_decay: Any = None,
        T: int | None = None,
        loss_average: str | int | None = "batch",
        lr_cov: Any = None,
        structures: choose.Structures | None = None,
        kfac_approx: str = "expand",
        warn_unsupported: bool = False,
        kfac_like: bool | None = None,
        preconditioner_dtype: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool | None = None,
        *,
        recipe: str = DEFAULT,
        memory_budget: int | None = None,
        momentum_dtype: torch.dtype | None = None,
        kfac: bool | None = None,
        average_groups: bool = False,
        compile_step: bool | dict[str, Any] = False,
        capturable: bool = False,
        fallback_lr: float | None = None,
        fallback_betas: tuple[float, float] = (0.9, 0.999),
        fallback_eps: float = 1e-8,
        fallback_weight_decay: float | None = None,
        processes: ProcessGroup | DeviceMesh | None = None,
        shard: bool = False,
        gradients: str = "mean",
        **given: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            model, params = without_model(model, params)
        refuse_zero_redundancy()
        check_model(model)
        model, copies = unwrapped(model)
        if processes is not None:
            copies = group_of(processes)
        if shard and copies is None:
            raise ValueError(
                "shard=True: give SINGD the model in its DistributedDataParallel wrapper, or "
                "processes=, those among which the state is parted. Leave shard out for a model in "
                "parts, as of fully_shard: its state is in parts in any case"
            )
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients={gradients!r}: choose 'mean' or 'sum'")
        check_names(given, inspect.signature(SINGD).parameters)
        given |= {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "T": T,
            "lr_cov": lr_cov,
            "kfac_like": kfac_like,
            "normalize_lr_cov": normalize_lr_cov,
            "kfac": kfac,
        }
        chosen = settings(recipe, **given)
        others = fallback_of(recipe, weight_decay)
        if fallback_weight_decay is None:
            fallback_weight_decay = others.weight_decay
        defaults = vars(chosen) | {
            "loss_average": loss_average,
            "structures": STRUCTURES[recipe] if structures is None else structures,
            "kfac_approx": kfac_approx,
            "preconditioner_dtype": preconditioner_dtype,
            "momentum_dtype": momentum_dtype,
            "average_groups": average_groups,
            "fallback_lr": others.lr if fallback_lr is None else fallback_lr,
            "fallback_betas": fallback_betas,
            "fallback_eps": fallback_eps,
            "fallback_weight_decay": fallback_weight_decay,
        }
        defaults = {name: plain(value) for name, value in defaults.items()}
        defaults["base_lr"] = float(defaults["lr"]) or RECIPES[recipe].lr  # AdamW's share is of it
        if capturable and (compile_step is not False or shard):
            other = "shard" if shard else "compile_step"
            raise ValueError(f"capturable=True and {other} exclude each other: leave one out")
        part_again(model)
        self._begin(model)
        stepper = self._stepper
        stepper.processes, stepper.shard, stepper.summed = copies, shard, gradients == "sum"
        if compile_step is not False:
            stepper.compile = {} if compile_step is True else compile_step
        stepper.capturable = capturable
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no parameter that requires a gradient")
        params = parameters_of(params)
        own = [{"lr": lr}, *(group for group in params if isinstance(group, dict))]
        of_steps = (group for group in own if group.get("normalized", defaults["normalized"]))
        small = small_step(group.get("lr") for group in of_steps)
        super().__init__(params, defaults)
        if small:
            warn(small)
        if memory_budget is not None or any(g["structures"] == "auto" for g in self.param_groups):
            richest = automatic(model, self.param_groups, memory_budget)
            for group in (self.defaults, *self.param_groups):
                if group["structures"] == "auto":
                    group["structures"] = richest
        self._route()
        if warn_unsupported and self._roster.fallback:
            names = ", ".join(self._roster.names.get(p, "?") for p in self._roster.fallback)
            warn(f"trained by AdamW, not preconditioned: {names}")

    # ---- parameters -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with settings of its own.

        Keys that are no settings, such as the keys of a schedule, are kept.

        Raises:
            TypeError: If the parameters are in a set, or are no parameters.
            ValueError: If a setting is wrong or a parameter is given twice.
        """
        group = {name: plain(value) for name, value in with_rule(param_group).items()}
        group["params"] = parameters_of(group["params"])
        params = bare(group["params"])
        if len({id(p) for p in params}) < len(params):
            raise ValueError("a parameter is given twice in one parameter group")
        roster = self._roster
        if roster.group_of:  # after construction
            part_again(roster.model)
        roster.names |= {p: name for name, p in roster.model.named_parameters()}
        for name in (roster.names.get(p, "a parameter") for p in params if is_lazy(p)):
            raise ValueError(f"{name!r} has no shape yet: call the model once before")
        if is_zero(group.get("weight_decay")):  # of the whole group, its norms and biases included
            group.setdefault("fallback_weight_decay", 0.0)
        check_keys(group, self.defaults)
        check_group(self.defaults | group)
        mode = (self.defaults | group)["rounding"]
        random = self._stepper.capturable and mode == "stochastic"
        if random and any(format_of(p.dtype) for p in params):
            raise ValueError(
                "capturable=True: a CUDA graph would repeat the random bits of one step, by which "
                'weights of 16 bits are rounded: choose rounding="kahan"'
            )
        if group.get("structures") == "auto" and roster.group_of:
            raise ValueError('structures="auto": it is decided at construction; give "auto:b"')
        first = float(group.get("lr", self.defaults["lr"])) or self.defaults["base_lr"]
        group = {"steps": 0, "largest_lr": 0.0, "base_lr": first} | group
        check_counts(group)
        super().add_param_group(group)
        if roster.group_of:
            self._route()

    # ---- what a person sees ---------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Quantities of each layer's factors and steps, by `name of the weight/quantity`.

        Some quantities are known only within a step (step and bounded, agreement, update). The
        first call starts their recording. Later calls return their values in the last step and
        refresh. This method waits for the device; steps do not. A layer of several matrices
        (groups, packed projections) has the largest value of its matrices. The quantities are

        - K_norm, C_norm: the Frobenius norms of the factors (S_K_norm, S_C_norm for KFAC);
        - K_step, C_step: β₁ ‖m‖_F of the last refresh, before its bound;
        - K_bounded, C_bounded: 1 if the bound then was active, else 0;
        - K_damping, C_damping: the damping's share λ / (t + λ) of the mean diagonal;
        - agreement: how much the late gradients agree, from 0 to 1 (1 if the rule does not ask);
        - update: the norm of the update, decoupled decay apart, over the norm of the weight.

        With a model in parts, all processes must call it. Each gets the layers that it steps.
        """
        stepper = self._stepper
        if stepper.sharded is not None:
            return stepper.sharded.diagnostics()
        stepper.report()
        return _diagnostics.read(stepper.stacks)

    def __repr__(self) -> str:
        """The rule that trains each parameter, its structures, and its bytes of state."""
        roster, sharded = self._roster, self._stepper.sharded
        owners = None if sharded is None else sharded.owners
        why = by_choice(roster.model, roster.layers)
        why |= dict(reasons(roster.model, roster.notes))
        table = _table.table(roster.layers, roster.fallback, roster.names, why, owners)
        return f"{type(self).__name__}\n{table}"
