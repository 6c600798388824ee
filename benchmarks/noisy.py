"""Training with noisy gradients, at a constant rate and with a schedule: SINGD beside AdamW.

Three small tasks that are mostly trained without a schedule: a physics-informed network with fresh
points in each step, reinforcement learning by PPO, and a GAN with a gradient penalty.

    python benchmarks/noisy.py

It prints a table of means and ranges over the seeds, with all settings that were tried. One thread
takes about two minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from pages import digits, table
from torch import Tensor, nn

from singd_torch import SINGD

# Of a model and a number of steps.
Build: TypeAlias = Callable[[nn.Module, int], torch.optim.Optimizer]


def adamw(model: nn.Module, **given: Any) -> torch.optim.Optimizer:
    """AdamW as torch has it."""
    return torch.optim.AdamW(model.parameters(), **given)


def built(model: nn.Module, steps: int, *, kind: Any, decay: bool, **given: Any) -> Any:
    """An optimizer, whose rate decays linearly to 0 or is constant."""
    optimizer = kind(model, **given)
    if decay:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"`AdamW(lr={lr:g})`": {"kind": adamw, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)},
    "`SINGD(model)`": {},
    "`lr=0.03`": {"lr": 0.03},
    "`lr=0.03, momentum=0.5`": {"lr": 0.03, "momentum": 0.5},
    '`structures="diagonal"`': {"structures": "diagonal"},
    '`structures="diagonal", lr=0.03`': {"structures": "diagonal", "lr": 0.03},
}
OPTIMIZERS: dict[str, Build] = {
    name + (", decay" if decay else ""): partial(built, **{"kind": SINGD} | given, decay=decay)
    for decay in (False, True)
    for name, given in SETTINGS.items()
}


def network(*sides: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of these sides."""
    layers = [(nn.Linear(a, b), activation()) for a, b in pairwise(sides)]
    return nn.Sequential(*[part for pair in layers for part in pair][:-1])


# ---- the tasks ----------------------------------------------------------------------------------


def physics(build: Build, steps: int) -> float:
    """u'' = -9 sin 3x on [-1, 1], with its values at the ends: the mean of the last losses."""
    model = network(1, 48, 48, 1)
    optimizer, losses = build(model, steps), []
    ends = torch.tensor([[-1.0], [1.0]])
    for _ in range(steps):
        x = (2.0 * torch.rand(64, 1) - 1.0).requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        inside = (ddu + 9.0 * (3.0 * x).sin()).square().mean()
        loss = inside + 10.0 * (model(ends) - (3.0 * ends).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-steps // 10 :])


class Carts:
    """Carts on a line, pushed to the left, not at all or to the right, that are to stay at 0."""

    def __init__(self, n: int) -> None:
        self.at, self.speed, self.goal = torch.randn(n), torch.zeros(n), torch.zeros(n)

    def see(self) -> Tensor:
        """What a cart knows."""
        return torch.stack([self.at, self.speed, self.at.abs(), self.speed.abs()], 1)

    def push(self, action: Tensor) -> Tensor:
        """One turn; the rewards."""
        self.speed = 0.9 * self.speed + 0.2 * (action - 1.0)
        self.at = self.at + 0.2 * self.speed
        rewards = -self.at.abs() - 0.1 * self.speed.abs()
        lost = (torch.rand(len(self.at)) < 0.03) | (self.at.abs() > 4.0)
        self.at = torch.where(lost, 2.0 * torch.randn(len(self.at)), self.at)
        return rewards


def reinforced(build: Build, rounds: int) -> float:
    """PPO on carts: the mean reward of the last rounds, with the sign of a loss."""
    model = nn.ModuleDict({"actor": network(4, 64, 64, 3), "critic": network(4, 64, 64, 1)})
    optimizer, carts, found = build(model, rounds * 4 * 4), Carts(16), []
    for _ in range(rounds):
        seen, actions, likely, rewards, values = [], [], [], [], []
        with torch.no_grad():
            for _ in range(32):
                x = carts.see()
                choice = torch.distributions.Categorical(logits=model["actor"](x))
                action = choice.sample()
                seen.append(x)
                actions.append(action)
                likely.append(choice.log_prob(action))
                values.append(model["critic"](x)[:, 0])
                rewards.append(carts.push(action))
            following = model["critic"](carts.see())[:, 0]
            gain, gains = torch.zeros(16), []
            for reward, value in zip(reversed(rewards), reversed(values), strict=True):
                gain = reward + 0.97 * following - value + 0.97 * 0.95 * gain
                following = value
                gains.append(gain)
        gained = torch.stack(gains[::-1]).flatten()
        wanted = gained + torch.stack(values).flatten()
        x, taken, before = (torch.cat(parts) for parts in (seen, actions, likely))
        found.append(torch.stack(rewards).mean().item())
        for _ in range(4):
            for i in torch.randperm(len(x)).split(128):
                choice = torch.distributions.Categorical(logits=model["actor"](x[i]))
                ratio = (choice.log_prob(taken[i]) - before[i]).exp()
                own = (gained[i] - gained[i].mean()) / (gained[i].std() + 1e-8)
                loss = -torch.min(own * ratio, own * ratio.clamp(0.8, 1.2)).mean()
                loss = loss + 0.5 * (model["critic"](x[i])[:, 0] - wanted[i]).square().mean()
                loss = loss - 0.01 * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return -statistics.fmean(found[-rounds // 5 :])


def energy(made: Tensor, x: Tensor) -> float:
    """The energy distance of two clouds of points."""
    pairs = ((made, x), (made, made), (x, x))
    between, *inside = (torch.cdist(a, b).mean().item() for a, b in pairs)
    return 2.0 * between - sum(inside)


def adversarial(build: Build, steps: int) -> float:
    """A WGAN with a gradient penalty for eight points on a circle: the energy distance."""
    leaky = partial(nn.LeakyReLU, 0.2)
    generator = network(4, 64, 64, 2, activation=nn.ReLU)
    critic = network(2, 64, 64, 1, activation=leaky)  # type: ignore[arg-type]
    of_generator, of_critic = build(generator, steps), build(critic, 3 * steps)

    def real(n: int) -> Tensor:
        angle = torch.randint(8, (n,)) * (math.pi / 4.0)
        return 2.0 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2)

    for _ in range(steps):
        for _ in range(3):
            x, made, share = real(64), generator(torch.randn(64, 4)).detach(), torch.rand(64, 1)
            between = (share * x + (1.0 - share) * made).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = 10.0 * (slope.norm(dim=1) - 1.0).square().mean()
            of_critic.zero_grad()
            (critic(made).mean() - critic(x).mean() + penalty).backward()
            of_critic.step()
        of_generator.zero_grad()
        (-critic(generator(torch.randn(64, 4))).mean()).backward()
        of_generator.step()
    with torch.no_grad():
        return energy(generator(torch.randn(1000, 4)), real(1000))


TASKS: dict[str, tuple[str, Callable[[Build, int], float], int]] = {
    "physics": ("physics-informed network, loss", physics, 600),
    "ppo": ("PPO, minus the reward", reinforced, 25),
    "gan": ("GAN, energy distance", adversarial, 300),
}


def main(given: Sequence[str] | None = None) -> str:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = []
    for name, build in OPTIMIZERS.items():
        cells = [name]
        for task in args.tasks:
            _, run, steps = TASKS[task]
            found = []
            for seed in args.seeds:
                torch.manual_seed(seed)
                found.append(run(build, max(5, round(args.share * steps))))
            mean, least, most = statistics.fmean(found), min(found), max(found)
            cells.append(f"{digits(mean)} ({digits(least)} to {digits(most)})")
        rows.append(cells)
    shown = table(["", *(TASKS[task][0] for task in args.tasks)], rows)
    print(shown)
    return shown


if __name__ == "__main__":
    main()
