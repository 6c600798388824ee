"""Tasks of `many.py`: regressions, embeddings, sets and a graph."""

from __future__ import annotations

import math

import numpy as np
import task_data
import torch
import torch.nn.functional as F
from many_tasks_common import Task, at_end, fitted, fixed
from noisy import Build, network
from torch import Tensor, nn

# ---- regressions --------------------------------------------------------------------------------


def friedman(x: Tensor) -> Tensor:
    """Friedman's function of the first five features, about 1 in size."""
    bent = 2.0 * (math.pi * x[:, 0] * x[:, 1]).sin() + 4.0 * (x[:, 2] - 0.5).square()
    return (bent + 2.0 * x[:, 3] + x[:, 4] - 3.0)[:, None]


def batch_norm(build: Build, steps: int) -> float:
    """Ten features of sizes from 0.01 to 100, batch norm: the squared error at the end."""
    sizes = 10.0 ** torch.linspace(-2.0, 2.0, 10)
    norms = [(nn.BatchNorm1d(a), nn.Linear(a, b), nn.ReLU()) for a, b in ((10, 64), (64, 64))]
    last = nn.BatchNorm1d(64), nn.Linear(64, 1)
    model = nn.Sequential(*norms[0], *norms[1], *last)

    def loss() -> Tensor:
        x = torch.rand(64, 10)
        return F.mse_loss(model(x * sizes), friedman(x) + 0.1 * torch.randn(64, 1))

    fitted(build, model, steps, loss)
    x = torch.rand(2000, 10, generator=fixed())
    return at_end(model, lambda: F.mse_loss(model(x * sizes), friedman(x)))


def heavy_tails(build: Build, steps: int) -> float:
    """Targets with the noise of Student's t with 1.5 degrees: the error of the clean ones."""
    model, noise = network(5, 64, 64, 1), torch.distributions.StudentT(1.5)

    def loss() -> Tensor:
        x = torch.rand(64, 5)
        return F.mse_loss(model(x), friedman(x) + 0.3 * noise.sample((64, 1)))

    fitted(build, model, steps, loss)
    x = torch.rand(2000, 5, generator=fixed())
    return at_end(model, lambda: F.mse_loss(model(x), friedman(x)))


def pinball(build: Build, steps: int) -> float:
    """Three quantiles, whose loss has an edge."""
    model, levels = network(5, 64, 64, 3, activation=nn.ReLU), torch.tensor([0.1, 0.5, 0.9])

    def loss() -> Tensor:
        x = torch.rand(128, 5)
        over = friedman(x) + x[:, :1] * torch.randn(128, 1) - model(x)
        return torch.max(levels * over, (levels - 1.0) * over).mean()

    return fitted(build, model, steps, loss)


def counts(build: Build, steps: int) -> float:
    """Poisson's loss of counts from 0 to some hundreds."""
    model = network(5, 64, 64, 1)

    def loss() -> Tensor:
        x = torch.rand(64, 5)
        return F.poisson_nll_loss(model(x), torch.poisson((2.0 + friedman(x)).exp()), full=True)

    return fitted(build, model, steps, loss)


def steep(build: Build, steps: int) -> float:
    """A linear regression whose inputs have a covariance of condition 10⁴."""
    model, sizes = nn.Linear(32, 1), 10.0 ** torch.linspace(0.0, -2.0, 32)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=fixed())).Q
    wanted = torch.randn(32, 1, generator=fixed(1))

    def loss() -> Tensor:
        z = torch.randn(64, 32) * sizes
        return F.mse_loss(model(z @ turn), z @ wanted)

    return fitted(build, model, steps, loss)


def spirals(build: Build, steps: int) -> float:
    """Two spirals, all 200 points in each step."""
    model, far = network(2, 32, 32, 1), torch.linspace(0.2, 1.0, 100)
    arm = torch.stack([far * (10.0 * far).cos(), far * (10.0 * far).sin()], 1)
    x, y = torch.cat([arm, -arm]), torch.arange(200)[:, None].lt(100).float()
    return fitted(build, model, steps, lambda: F.binary_cross_entropy_with_logits(model(x), y))


def densities(build: Build, steps: int) -> float:
    """A mixture density network of five Gaussians for a curve that goes back and forth."""
    model = network(1, 48, 48, 15)

    def loss() -> Tensor:
        y = 2.0 * torch.rand(128, 1) - 1.0
        x = y + 0.4 * (6.0 * y).sin() + 0.05 * torch.randn(128, 1)
        share, mean, scale = model(x).chunk(3, 1)
        each = torch.distributions.Normal(mean, F.softplus(scale) + 1e-3).log_prob(y)
        return -(share.log_softmax(1) + each).logsumexp(1).mean()

    return fitted(build, model, steps, loss)


class DeepKernel(nn.Module):
    """A Gaussian process on features that a network makes, with three numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.sizes = network(5, 32, 32, 4), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the logarithmic likelihood of a value."""
        z, (length, height, noise) = self.features(x), self.sizes.exp()
        apart = (z[:, None] - z).square().sum(-1)
        kernel = height * (-apart / length).exp() + (0.1 * noise + 1e-3) * torch.eye(len(x))
        root = torch.linalg.cholesky(kernel)
        solved = torch.linalg.solve_triangular(root, y, upper=False)
        return 0.5 * solved.square().mean() + root.diagonal().log().mean()


def kernel(build: Build, steps: int) -> float:
    """A Gaussian process with a deep kernel, by the likelihood of 48 points."""
    model = DeepKernel()

    def loss() -> Tensor:
        x = torch.rand(48, 5)
        return model(x, friedman(x) + 0.1 * torch.randn(48, 1))

    return fitted(build, model, steps, loss)


# ---- embeddings, sets, a graph ------------------------------------------------------------------


class Factors(nn.Module):
    """Ratings as products of a user's and a film's eight numbers."""

    def __init__(self, users: int, films: int) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(users, 8), nn.Embedding(films, 8)
        for table in (self.users, self.films):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, film: Tensor) -> Tensor:
        return (self.users(user) * self.films(film)).sum(1)


def ratings(build: Build, steps: int) -> float:
    """The factors of a matrix of rank 4 with noise: the squared error of the clean matrix."""
    model = Factors(300, 200)
    a, b = (torch.randn(n, 4, generator=fixed(n)) for n in (300, 200))
    clean = a @ b.T / 2.0

    def loss() -> Tensor:
        user, film = torch.randint(300, (256,)), torch.randint(200, (256,))
        return F.mse_loss(model(user, film), clean[user, film] + 0.5 * torch.randn(256))

    fitted(build, model, steps, loss)
    user, film = torch.cartesian_prod(torch.arange(300), torch.arange(200)).T
    return at_end(model, lambda: F.mse_loss(model(user, film), clean[user, film]))


class Clicks(nn.Module):
    """The chance of a click, from ten things seen before and one that is offered."""

    def __init__(self, things: int) -> None:
        super().__init__()
        self.seen, self.offered = nn.EmbeddingBag(things, 16), nn.Embedding(things, 16)
        self.rest = network(32, 32, 1, activation=nn.ReLU)

    def forward(self, seen: Tensor, offered: Tensor) -> Tensor:
        return self.rest(torch.cat([self.seen(seen), self.offered(offered)], 1))[:, 0]


def recommender(build: Build, steps: int) -> float:
    """Clicks on 2000 things, of which some are seen often and most hardly ever."""
    model, taste = Clicks(2000), torch.randn(2000, 4, generator=fixed())
    often = 1.0 / torch.arange(1.0, 2001.0)

    def loss() -> Tensor:
        drawn = often.multinomial(128 * 11, replacement=True).view(128, 11)
        seen, offered = drawn[:, :10], drawn[:, 10]
        like = 2.0 * (taste[seen].mean(1) * taste[offered]).sum(1)
        return F.binary_cross_entropy_with_logits(model(seen, offered), like.sigmoid().bernoulli())

    return fitted(build, model, steps, loss)


def sets(build: Build, steps: int) -> float:
    """Deep sets (Zaheer et al., arXiv 1703.06114): the deviation and the greatest of 16 numbers."""
    inner, outer = network(1, 32, 32, activation=nn.ReLU), network(32, 32, 2, activation=nn.ReLU)
    model = nn.ModuleDict({"inner": inner, "outer": outer})

    def loss() -> Tensor:
        x = torch.rand(64, 1, 1) + torch.rand(64, 1, 1) * torch.randn(64, 16, 1)
        wanted = torch.cat([x.std(1), x.amax(1)], 1)
        return F.mse_loss(outer(inner(x).mean(1)), wanted)

    return fitted(build, model, steps, loss)


class Attention(nn.Module):
    """A layer of graph attention (Veličković et al., arXiv 1710.10903) with some heads."""

    def __init__(self, d_in: int, d: int, heads: int) -> None:
        super().__init__()
        self.values, self.heads = nn.Linear(d_in, heads * d, bias=False), heads
        self.ends = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * heads, d)))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        value = self.values(x).unflatten(1, (self.heads, -1))
        to, start = edges
        one, other = ((value * part).sum(-1) for part in self.ends.chunk(2))
        score = F.leaky_relu(one[to] + other[start], 0.2)
        least, rows = score.new_full((len(x), self.heads), -torch.inf), to[:, None].expand_as(score)
        most = least.scatter_reduce(0, rows, score.detach(), "amax")
        score = (score - most[to]).exp()
        total = torch.zeros_like(most).index_add(0, to, score)
        share = F.dropout(score / total[to], 0.5, self.training)
        return torch.zeros_like(value).index_add(0, to, share[..., None] * value[start]).flatten(1)


def graph(build: Build, steps: int) -> float:
    """Two layers of graph attention with dropout on all papers of Cora."""
    with np.load(task_data.CORA) as cora:
        n, edges = int(cora["n_nodes"]), torch.from_numpy(cora["edges"].astype(np.int64))
        at = [torch.from_numpy(cora[f"feature_{k}"].astype(np.int64)) for k in ("rows", "cols")]
        words = torch.zeros(n, int(cora["n_features"]))
    words[at[0], at[1]] = 1.0
    words = F.normalize(words, p=1.0)
    edges = torch.cat([edges.T, edges.T.flip(0), torch.arange(n).expand(2, n)], dim=1)
    model = nn.ModuleDict({"first": Attention(words.shape[1], 8, 4), "last": Attention(32, 7, 1)})
    papers, topics = task_data.citations()[0]

    def loss() -> Tensor:
        hidden = F.dropout(F.elu(model["first"](words, edges)), 0.5)
        return F.cross_entropy(model["last"](hidden, edges)[papers], topics)

    return fitted(build, model, steps, loss)


TASKS = {
    "batch-norm": Task("features of many sizes, batch norm: error", batch_norm, 600),
    "heavy-tails": Task("targets with heavy tails: error", heavy_tails, 1200),
    "pinball": Task("quantiles", pinball, 1200),
    "counts": Task("counts, Poisson's loss", counts, 1200),
    "steep": Task("linear regression of condition 10⁴", steep, 1500),
    "spirals": Task("two spirals, full batch", spirals, 800),
    "densities": Task("mixture density network", densities, 1000),
    "kernel": Task("Gaussian process with a deep kernel", kernel, 400),
    "ratings": Task("matrix factors of ratings: error", ratings, 1500),
    "recommender": Task("clicks, rare embeddings", recommender, 800),
    "sets": Task("deep sets", sets, 1000),
    "graph": Task("graph attention on Cora", graph, 100, task_data.CORA),
}
