"""Tasks of `many.py`: images and scenes as functions of a place, differential equations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import task_data
import torch
import torch.nn.functional as F
from many_tasks_common import Task, at_end, fitted, fixed
from noisy import Build, network, physics
from torch import Tensor, nn

PI = math.pi

# ---- images and scenes --------------------------------------------------------------------------


class Sine(nn.Module):
    """A sine of 30 times its input."""

    def forward(self, x: Tensor) -> Tensor:
        return (30.0 * x).sin()


@functools.cache
def picture() -> tuple[Tensor, Tensor]:
    """The places of 32 × 32 pixels and their values: sixteen digits."""
    images = task_data.digits()[0][0][:16].view(4, 4, 8, 8)
    side = torch.linspace(-1.0, 1.0, 32)
    places = torch.cartesian_prod(side, side)
    return places, images.transpose(1, 2).reshape(-1, 1)


def siren(build: Build, steps: int) -> float:
    """A network of sines (Sitzmann et al., arXiv 2006.09661) that fits an image."""
    model = network(2, 64, 64, 64, 1, activation=Sine)
    for i, layer in enumerate(model[::2]):
        bound = 0.5 if i == 0 else math.sqrt(6.0 / 64) / 30.0
        nn.init.uniform_(layer.weight, -bound, bound)
    x, y = picture()
    return fitted(build, model, steps, lambda: F.mse_loss(model(x), y))


def fourier(build: Build, steps: int) -> float:
    """A network on random waves of the place (Tancik et al., arXiv 2006.10739)."""
    waves = 2.0 * PI * torch.randn(2, 32, generator=fixed())
    model = network(64, 64, 64, 1, activation=nn.ReLU)
    x, y = picture()
    seen = torch.cat([(x @ waves).sin(), (x @ waves).cos()], 1)

    def loss() -> Tensor:
        rows = torch.randint(len(x), (256,))
        return F.mse_loss(model(seen[rows]), y[rows])

    return fitted(build, model, steps, loss)


def scene(at: Tensor) -> tuple[Tensor, Tensor]:
    """The density and the brightness of three discs, at places of the plane."""
    density, light = torch.zeros(at.shape[:-1]), torch.zeros(at.shape[:-1])
    for x, y, radius, bright in (
        (0.3, 0.2, 0.3, 1.0),
        (-0.4, 0.1, 0.2, 0.5),
        (0.0, -0.4, 0.25, 0.2),
    ):
        inside = (20.0 * (radius - (at - torch.tensor([x, y])).norm(dim=-1))).sigmoid()
        density, light = density + 8.0 * inside, torch.lerp(light, torch.tensor(bright), inside)
    return density, light


def rendered(density: Tensor, light: Tensor, apart: float) -> Tensor:
    """What is seen along rays."""
    stopped = 1.0 - (-apart * density).exp()
    left = (1.0 - stopped).cumprod(1).roll(1, 1)
    left = torch.cat([torch.ones_like(left[:, :1]), left[:, 1:]], 1)
    return (stopped * left * light).sum(1)


def rays(build: Build, steps: int) -> float:
    """A field of density and light, learned from what is seen along rays, as in NeRF."""
    model, powers = network(22, 64, 64, 2, activation=nn.ReLU), PI * 2.0 ** torch.arange(5)

    def loss() -> Tensor:
        angle, aim = 2.0 * PI * torch.rand(32, 1), 0.6 * torch.randn(32, 1)
        toward = torch.cat([angle.cos(), angle.sin()], 1)
        start = -toward + aim * torch.stack([-toward[:, 1], toward[:, 0]], 1)
        far = (torch.arange(24) + torch.rand(32, 24)) / 12.0
        at = start[:, None] + far[..., None] * toward[:, None]
        waves = (at[..., None] * powers).flatten(-2)
        found = model(torch.cat([at, waves.sin(), waves.cos()], -1))
        seen = rendered(F.softplus(found[..., 0]), found[..., 1].sigmoid(), 1.0 / 12.0)
        return F.mse_loss(seen, rendered(*scene(at), 1.0 / 12.0))

    return fitted(build, model, steps, loss)


# ---- differential equations ---------------------------------------------------------------------


def slope(of: Tensor, by: Tensor) -> Tensor:
    """The gradient of each value by its own place."""
    (found,) = torch.autograd.grad(of.sum(), by, create_graph=True)
    return found


def burgers(build: Build, steps: int) -> float:
    """u_t + u u_x = 0.05 u_xx on [0, 1] × [-1, 1], u = -sin(πx) at first, 0 at the ends."""
    model = network(2, 32, 32, 32, 1)

    def loss() -> Tensor:
        at = (
            torch.rand(64, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
        ).requires_grad_()
        u = model(at)
        first = slope(u, at)
        second = slope(first[:, 1], at)[:, 1]
        inside = first[:, 0] + u[:, 0] * first[:, 1] - 0.05 * second
        x, t = 2.0 * torch.rand(32, 1) - 1.0, torch.rand(32, 1)
        begin = model(torch.cat([torch.zeros(32, 1), x], 1)) + (PI * x).sin()
        ends = model(torch.cat([t, x.sign()], 1))
        return inside.square().mean() + 10.0 * (begin.square().mean() + ends.square().mean())

    return fitted(build, model, steps, loss)


def poisson(build: Build, steps: int) -> float:
    """-Δu = 2π² sin(πx) sin(πy) on a square, 0 around it: the squared error of u."""
    model = network(2, 32, 32, 1)

    def loss() -> Tensor:
        at = torch.rand(64, 2).requires_grad_()
        first = slope(model(at), at)
        bent = slope(first[:, 0], at)[:, 0] + slope(first[:, 1], at)[:, 1]
        source = 2.0 * PI**2 * (PI * at).sin().prod(1)
        edge, side = torch.rand(64, 2), torch.randint(2, (64,))
        edge[torch.arange(64), side] = torch.randint(2, (64,)).float()
        return (bent + source).square().mean() + 100.0 * model(edge).square().mean()

    fitted(build, model, steps, loss)
    line = torch.linspace(0.0, 1.0, 33)
    at = torch.cartesian_prod(line, line)
    return at_end(model, lambda: F.mse_loss(model(at)[:, 0], (PI * at).sin().prod(1)))


def operator(build: Build, steps: int) -> float:
    """A DeepONet (Lu et al., arXiv 1910.03193) that learns to integrate functions on [0, 1]."""
    model = nn.ModuleDict({"branch": network(20, 48, 48), "trunk": network(1, 48, 48)})
    ways, sensors = torch.arange(1, 6), torch.linspace(0.0, 1.0, 20)

    def loss() -> Tensor:
        sizes, at = torch.randn(64, 5), torch.rand(16, 1)
        seen = sizes @ (PI * ways[:, None] * sensors).sin()
        wanted = (1.0 - (PI * at * ways).cos()) / (PI * ways)
        return F.mse_loss(model["branch"](seen) @ model["trunk"](at).T, sizes @ wanted.T)

    return fitted(build, model, steps, loss)


def path(speed: Callable[[Tensor], Tensor], start: Tensor, h: float = 0.1, n: int = 5) -> Tensor:
    """Where a flow carries points, by Runge and Kutta's method."""
    x, found = start, []
    for _ in range(n):
        a = speed(x)
        b = speed(x + 0.5 * h * a)
        c = speed(x + 0.5 * h * b)
        x = x + h / 6.0 * (a + 2.0 * b + 2.0 * c + speed(x + h * c))
        found.append(x)
    return torch.stack(found)


def flow_of_time(build: Build, steps: int) -> float:
    """A neural ODE that learns the paths of a spiral with x' = A x³."""
    model, A = network(2, 32, 32, 2), torch.tensor([[-0.1, -2.0], [2.0, -0.1]])

    def loss() -> Tensor:
        start = 3.0 * torch.rand(32, 2) - 1.5
        return F.mse_loss(path(model, start), path(lambda x: x**3 @ A, start))

    return fitted(build, model, steps, loss)


def hyper(build: Build, steps: int) -> float:
    """A network that makes the 49 weights of another one, which is to be a sine."""
    model = network(2, 64, 64, 49)

    def loss() -> Tensor:
        code, x = 2.0 * torch.rand(32, 2) - 1.0, 2.0 * torch.rand(32, 16, 1) - 1.0
        w, b, out, last = model(code)[:, None].split([16, 16, 16, 1], -1)
        y = ((w * x + b).tanh() * out).sum(-1) + last[..., 0]
        return F.mse_loss(y, (1.0 + code[:, :1]) * (4.0 * x[..., 0] + 2.0 * code[:, 1:]).sin())

    return fitted(build, model, steps, loss)


TASKS = {
    "siren": Task("network of sines on an image", siren, 300),
    "fourier": Task("network on Fourier features of an image", fourier, 1000),
    "rays": Task("field seen along rays", rays, 800),
    "physics": Task("physics-informed, one dimension", physics, 600),
    "burgers": Task("physics-informed, Burgers", burgers, 400),
    "poisson": Task("physics-informed, Poisson on a square: error", poisson, 500),
    "operator": Task("DeepONet that integrates", operator, 1500),
    "ode": Task("neural ODE", flow_of_time, 250),
    "hyper": Task("hypernetwork of sines", hyper, 1200),
}
