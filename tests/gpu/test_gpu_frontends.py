"""The frontends of torch and jax train on a GPU as they do on the CPU."""

import contextlib

import numpy as np
import pytest
from gpus import SUBSTITUTE

STRUCTURES = [("dense", "dense"), ("diagonal", "diagonal"), ("hierarchical:2,3", "triltoeplitz")]


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 3, 8, 8))
    return x, rng.integers(5, size=32)


@pytest.mark.parametrize("structures", STRUCTURES, ids=str)
def test_torch_trains_a_network_as_on_the_cpu(of, structures):
    of("torch")
    import torch
    from torch import nn

    from singd_torch import SINGD

    def losses(device):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(216, 5)
        )
        net = net.double().to(device)
        x, y = (torch.from_numpy(a).to(device) for a in data())
        optimizer, found = SINGD(net, structures=structures), []
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).cpu().numpy()

    ours = losses("cpu" if SUBSTITUTE else "cuda")
    np.testing.assert_allclose(ours, losses("cpu"), rtol=1e-6)
    assert ours[-1] < ours[0]


def test_a_torch_step_does_not_wait_for_the_gpu(of):
    gpu = of("torch")
    import torch
    from torch import nn

    from singd_torch import SINGD

    device = "cpu" if SUBSTITUTE else "cuda"
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(device)
    x, y = torch.randn(16, 20, device=device), torch.randn(16, 5, device=device)
    optimizer = SINGD(net)
    # after 0, 1, 2, 4, 8, ... refreshes rows are compared with gradients, and the host waits
    for step in range(8):
        with gpu.no_wait() if step in (3, 5, 6, 7) else contextlib.nullcontext():
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.skipif(SUBSTITUTE, reason="a CUDA graph needs CUDA")
def test_a_cuda_graph_replays_torch_steps(of):
    of("torch")
    import torch
    from torch import nn

    from singd_torch import SINGD

    def train(replays):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 5))
        net, x, y = net.cuda(), torch.zeros(64, 20).cuda(), torch.zeros(64, 5).cuda()
        optimizer = SINGD(net, capturable=True, T=5, growing_T=False, warmup=2)
        graph, used, side = None, 0, torch.cuda.Stream()

        def step():
            optimizer.zero_grad(set_to_none=False)
            (net(x) - y).square().mean().backward()
            optimizer.step()

        for _ in range(30):
            x.copy_(torch.randn(64, 20))
            y.copy_(x[:, :5].sin())
            torch.cuda.synchronize()
            if not replays or not optimizer.replayable:
                with torch.cuda.stream(side):
                    step()
            elif graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                graph.replay()
            else:
                graph.replay()
                optimizer.replayed()
                used += 1
            torch.cuda.synchronize()
        assert used >= 10 or not replays
        return torch.cat([p.detach().flatten() for p in net.parameters()]).cpu().numpy()

    np.testing.assert_allclose(train(True), train(False), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(SUBSTITUTE, reason="compiling for a GPU needs one")
def test_compiled_torch_steps_are_the_steps(of):
    of("torch")
    import torch
    from torch import nn

    from singd_torch import SINGD

    def train(**given):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 5)).cuda()
        optimizer = SINGD(net, T=5, growing_T=False, warmup=2, **given)
        for _ in range(25):
            x = torch.randn(64, 20).cuda()
            optimizer.zero_grad()
            (net(x) - x[:, :5].sin()).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()]).cpu().numpy()

    np.testing.assert_allclose(train(compile_step=True), train(), rtol=1e-3, atol=1e-4)


def test_torch_trains_in_bfloat16(of):
    of("torch")
    import torch
    from torch import nn

    from singd_torch import SINGD

    device = "cpu" if SUBSTITUTE else "cuda"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(device, torch.bfloat16)
    x = torch.randn(64, 20, device=device, dtype=torch.bfloat16)
    optimizer, losses = SINGD(net), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(x) - x[:, :5]).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_jax_trains_a_network_as_on_the_cpu(of):
    of("jax")
    import jax
    import jax.numpy as jnp
    import optax

    import singd_jax

    x, y = np.float32(data()[0].reshape(32, -1)[:, :20]), np.float32(data()[0][:, 0, 0, :5])
    rng = np.random.default_rng(1)
    start = {
        "v": np.float32(rng.standard_normal((20, 30)) / 5),
        "a": np.zeros(30, np.float32),
        "w": np.float32(rng.standard_normal((30, 5)) / 5),
    }

    def loss(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["v"] + p["a"]) @ p["w"] - y) ** 2)

    def losses(device):
        with jax.default_device(device):
            params = jax.tree.map(jnp.asarray, start)
            layers = singd_jax.find_layers(loss, structures="dense")(params, x, y)
            tx = singd_jax.singd(0.02, layers=layers)
            state, found = tx.init(params), []

            @jax.jit
            def step(params, state):
                value, grads, curvature = singd_jax.value_and_curvature(loss, layers)(
                    params, state, x, y
                )
                updates, state = tx.update(grads, state, params, curvature=curvature)
                return optax.apply_updates(params, updates), state, value

            for _ in range(6):
                params, state, value = step(params, state)
                found.append(float(value))
            return found

    first = jax.devices("cpu" if SUBSTITUTE else "gpu")[0]
    ours = losses(first)
    # float32, whose products a GPU may make in TF32
    np.testing.assert_allclose(ours, losses(jax.devices("cpu")[0]), rtol=2e-3)
    assert ours[-1] < ours[0]
