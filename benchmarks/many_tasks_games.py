"""Tasks of `many.py`: models of distributions, adversaries and reinforcement learning."""

from __future__ import annotations

import copy
import math
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from many_tasks_common import Task, at_end, fitted
from noisy import Build, Carts, adversarial, energy, network, reinforced
from torch import Tensor, nn

# ---- distributions in the plane -----------------------------------------------------------------


def moons(n: int) -> Tensor:
    """Points of two moons."""
    angle, side = math.pi * torch.rand(n), 2.0 * torch.randint(2, (n,)) - 1.0
    at = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1) * side[:, None]
    return at + 0.1 * torch.randn(n, 2)


def spiral(n: int) -> Tensor:
    """Points of a spiral."""
    far = torch.rand(n).sqrt()
    return torch.stack([far * (9.0 * far).cos(), far * (9.0 * far).sin()], 1) * 1.5


class Coupling(nn.Module):
    """Moves and stretches one coordinate by what the other one is, then exchanges them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(1, 32, 32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stretch, move = self.inner(x[:, :1]).chunk(2, 1)
        stretch = stretch.tanh()
        return torch.cat([x[:, 1:] * stretch.exp() + move, x[:, :1]], 1), stretch[:, 0]


def flow(build: Build, steps: int) -> float:
    """RealNVP (Dinh et al., arXiv 1605.08803) on two moons: minus the logarithmic density."""
    model = nn.Sequential(*(Coupling() for _ in range(6)))

    def loss() -> Tensor:
        x, volume = moons(128), torch.zeros(128)
        for layer in model:
            x, stretch = layer(x)
            volume = volume + stretch
        return (0.5 * x.square().sum(1) + math.log(2.0 * math.pi) - volume).mean()

    return fitted(build, model, steps, loss)


def diffusion(build: Build, steps: int) -> float:
    """DDPM (Ho et al., arXiv 2006.11239) on a spiral: the squared error of the noise at the end."""
    model, powers = network(18, 64, 64, 64, 2, activation=nn.SiLU), 2.0 ** torch.arange(8)

    def loss(n: int = 128) -> Tensor:
        x, noise, time = spiral(n), torch.randn(n, 2), torch.rand(n, 1)
        kept = (0.5 * math.pi * time).cos()
        seen = kept * x + (1.0 - kept.square()).sqrt() * noise
        return F.mse_loss(
            model(torch.cat([seen, (time * powers).sin(), (time * powers).cos()], 1)), noise
        )

    fitted(build, model, steps, loss)
    return at_end(model, partial(loss, 8192))


def logistic_game(build: Build, steps: int) -> float:
    """A GAN with the logistic loss for a spiral: the energy distance."""
    generator = network(4, 64, 64, 2, activation=nn.ReLU)
    critic = network(2, 64, 64, 1, activation=nn.ReLU)
    of_generator, of_critic = build(generator, steps), build(critic, steps)
    for _ in range(steps):
        made = generator(torch.randn(64, 4))
        of_critic.zero_grad()
        wrong, right = critic(made.detach()), critic(spiral(64))
        (F.softplus(wrong) + F.softplus(-right)).mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        F.softplus(-critic(made)).mean().backward()
        of_generator.step()
    with torch.no_grad():
        return energy(generator(torch.randn(1000, 4)), spiral(1000))


# ---- reinforcement learning ---------------------------------------------------------------------


def policy_gradient(build: Build, steps: int) -> float:
    """REINFORCE on a board of 5 × 5 fields: the mean number of turns to its corner, of 16."""
    model, ways = network(25, 32, 4), torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
    optimizer, found = build(model, steps), []
    for _ in range(steps):
        at, likely, away = torch.randint(5, (32, 2)), [], []
        for _ in range(16):
            logits = model(F.one_hot(5 * at[:, 0] + at[:, 1], 25).float())
            choice = torch.distributions.Categorical(logits=logits)
            action, open_ = choice.sample(), (at > 0).any(1)
            at = torch.where(open_[:, None], (at + ways[action]).clamp(0, 4), at)
            likely.append(choice.log_prob(action))
            away.append(open_.float())
        turns = torch.stack(away)
        left = turns.flip(0).cumsum(0).flip(0)
        better = left.mean(1, keepdim=True) - left
        optimizer.zero_grad()
        (-(torch.stack(likely) * better * turns).sum(0).mean()).backward()
        optimizer.step()
        found.append(turns.sum(0).mean().item())
    return statistics.fmean(found[-steps // 10 :])


def values(build: Build, steps: int) -> float:
    """Deep Q-learning on carts, with a memory and a network that follows: minus the reward."""
    model, carts, found = network(4, 64, 64, 3, activation=nn.ReLU), Carts(16), []
    slow, optimizer = copy.deepcopy(model), build(model, steps)
    memory: list[tuple[Tensor, ...]] = []
    for step in range(steps):
        if step % 25 == 0:
            slow.load_state_dict(model.state_dict())
        with torch.no_grad():
            x = carts.see()
            any_ = torch.rand(16) < max(0.1, 1.0 - 3.0 * step / steps)
            action = torch.where(any_, torch.randint(3, (16,)), model(x).argmax(1))
            reward = carts.push(action)
        memory.append((x, action, reward, carts.see()))
        found.append(reward.mean().item())
        rows = torch.randint(max(0, len(memory) - 300), len(memory), (8,)).tolist()
        x, action, reward, then = (
            torch.cat(p) for p in zip(*(memory[i] for i in rows), strict=True)
        )
        with torch.no_grad():
            wanted = reward + 0.9 * slow(then).amax(1)
        optimizer.zero_grad()
        F.smooth_l1_loss(model(x).gather(1, action[:, None])[:, 0], wanted).backward()
        optimizer.step()
    return -statistics.fmean(found[-steps // 10 :])


class Poles:
    """Poles on carts, pushed to the left or to the right, that are to stay upright."""

    def __init__(self, n: int) -> None:
        self.state = 0.1 * torch.rand(n, 4) - 0.05

    def push(self, action: Tensor) -> Tensor:
        """One turn; which have fallen, and begin anew."""
        _, speed, angle, turning = self.state.T
        force = (20.0 * action - 10.0 + 0.05 * turning.square() * angle.sin()) / 1.1
        inertia = 0.5 * (4.0 / 3.0 - 0.1 * angle.cos().square() / 1.1)
        turned = (9.8 * angle.sin() - angle.cos() * force) / inertia
        moved = force - 0.05 * turned * angle.cos() / 1.1
        self.state = self.state + 0.02 * torch.stack([speed, moved, turning, turned], 1)
        fallen = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.2)
        begun = 0.1 * torch.rand(self.state.shape) - 0.05
        self.state = torch.where(fallen[:, None], begun, self.state)
        return fallen.float()


def actor_critic(build: Build, steps: int) -> float:
    """Advantage actor-critic on poles: how many of a hundred turns end in a fall."""
    actor, critic = network(4, 64, 2), network(4, 64, 1)
    model, poles, found = nn.ModuleDict({"actor": actor, "critic": critic}), Poles(16), []
    optimizer, scale = build(model, steps), torch.tensor([1.0, 1.0, 5.0, 1.0])
    for _ in range(steps):
        seen, actions, falls = [], [], []
        with torch.no_grad():
            for _ in range(16):
                x = poles.state * scale
                action = torch.distributions.Categorical(logits=actor(x)).sample()
                seen.append(x)
                actions.append(action)
                falls.append(poles.push(action))
            gain, gains = critic(poles.state * scale)[:, 0], []
            for fall in reversed(falls):
                gain = 0.1 * (1.0 - fall) + 0.95 * (1.0 - fall) * gain
                gains.append(gain)
        x, gained = torch.cat(seen), torch.cat(gains[::-1])
        choice, value = torch.distributions.Categorical(logits=actor(x)), critic(x)[:, 0]
        better = (gained - value).detach()
        loss = -(choice.log_prob(torch.cat(actions)) * better).mean()
        loss = loss + 0.5 * (gained - value).square().mean() - 0.01 * choice.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(torch.stack(falls).mean().item())
    return 100.0 * statistics.fmean(found[-steps // 5 :])


TASKS = {
    "flow": Task("RealNVP on two moons", flow, 400),
    "diffusion": Task("diffusion on a spiral: error", diffusion, 1000),
    "gan": Task("GAN with a gradient penalty: energy distance", adversarial, 300),
    "logistic-gan": Task("GAN with the logistic loss: energy distance", logistic_game, 600),
    "ppo": Task("PPO: minus the reward", reinforced, 25),
    "reinforce": Task("REINFORCE: turns", policy_gradient, 200),
    "dqn": Task("deep Q-learning: minus the reward", values, 800),
    "actor-critic": Task("actor-critic: falls of 100 turns", actor_critic, 250),
}
