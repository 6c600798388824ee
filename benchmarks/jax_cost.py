"""What the curvature costs in JAX: peak temporary memory, and processor time to compile and step.

A transformer of equal blocks in a scan, with `jax.checkpoint` and without, in float32; with
`--first` behind a linear layer, so that the scan does not begin with the batch itself; with
`--unrolled` each block has parameters of its own. Steps are timed beside those of optax.

    python benchmarks/jax_cost.py [--blocks 8] [--width 256] [--batch 8] [--length 256] [--steps 0]
        [--first] [--unrolled]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import singd_jax


def init(key, blocks, d, first):
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    params = {}
    for name, (d_in, d_out) in shapes.items():
        key, own = jax.random.split(key)
        w = jax.random.normal(own, (blocks, d_in, d_out)) / d_in**0.5
        params[name] = {"w": w, "b": jnp.zeros((blocks, d_out))}
    return {"blocks": params} | ({"first": jnp.eye(d)} if first else {})


def make_loss(remat, heads=4):
    def dense(p, x):
        return x @ p["w"] + p["b"]

    def block(x, p):
        n, length, d = x.shape
        y = jax.nn.standardize(x)
        q, k, v = jnp.split(dense(p["qkv"], y).reshape(n, length, 3 * heads, -1), 3, axis=2)
        a = jax.nn.softmax(jnp.einsum("nshk,nthk->nhst", q, k) / (d // heads) ** 0.5)
        x = x + dense(p["out"], jnp.einsum("nhst,nthk->nshk", a, v).reshape(x.shape))
        return x + dense(p["down"], jax.nn.gelu(dense(p["up"], jax.nn.standardize(x)))), None

    def loss(params, x):
        x = x @ params["first"] if "first" in params else x
        step = jax.checkpoint(block) if remat else block
        if isinstance(params["blocks"], list):
            y = functools.reduce(lambda x, p: step(x, p)[0], params["blocks"], x)
        else:
            y, _ = jax.lax.scan(step, x, params["blocks"])
        return jnp.mean(jnp.sum((jnp.tanh(y) - 0.3) ** 2, axis=(1, 2)))

    return loss


def compiled(function, *args):
    """The compiled function, and the seconds of processor time that tracing and compiling took."""
    start = time.process_time()
    lowered = jax.jit(function).lower(*args)
    traced = time.process_time()
    done = lowered.compile()
    return done, traced - start, time.process_time() - traced


def report(name, function, args, base=None):
    """Memory and processor time of a function, beside those of the gradient."""
    done, trace, compile_ = compiled(function, *args)
    temp, total = done.memory_analysis().temp_size_in_bytes / 2**20, trace + compile_
    more, times = "", ""
    if base is not None:
        more, times = f" {100 * (temp / base[0] - 1):+6.1f} %", f" = {total / base[1]:4.2f} x"
    print(
        f"{name:32} {temp:8.1f} MiB{more:10}  trace {trace:5.2f} s  compile {compile_:6.2f} s"
        f"{times}",
        flush=True,
    )
    return temp, total


def memory(loss, params, x):
    base = report("gradient", jax.value_and_grad(loss), (params, x))
    for structures in (None, "diagonal", "dense"):
        layers = singd_jax.find_layers(loss, structures=structures)(params, x)
        for T, branch in ((1, None), (10, None), (10, "step"), (10, "layer")):
            state = jax.eval_shape(
                singd_jax.singd(layers=layers, T=T, growing_T=False).init, params
            )
            function = singd_jax.value_and_curvature(loss, layers, branch=branch)
            name = f"{structures or 'default'}, T={T}" + (f', branch="{branch}"' if branch else "")
            report(name, function, (params, state, x), base)


def step_time(loss, params, x, steps):
    layers = singd_jax.find_layers(loss)(params, x)
    optimizers = {"adamw": optax.adamw(1e-3)}
    for name in ("muon", "soap"):  # where this optax has it
        if hasattr(optax.contrib, name):
            optimizers[name] = getattr(optax.contrib, name)(1e-3)
    of_optax = list(optimizers)
    for structures in (None, "diagonal", "dense"):
        for T in (1, 10):
            optimizers[f"{structures or 'default'}, T={T}"] = singd_jax.singd(
                layers=layers, structures=structures, T=T, growing_T=False
            )
    for name, tx in optimizers.items():

        def step(params, state, x, tx=tx, name=name):
            if name in of_optax:
                _, grads = jax.value_and_grad(loss)(params, x)
                updates, state = tx.update(grads, state, params)
            else:
                function = singd_jax.value_and_curvature(loss, layers)
                _, grads, curvature = function(params, state, x)
                updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state

        run, state, now = jax.jit(step), tx.init(params), params
        times = []
        for _ in range(steps + 1):
            start = time.process_time()  # others on the machine do not count
            now, state = jax.block_until_ready(run(now, state, x))
            times.append(time.process_time() - start)
        mean = sum(times[1:]) / steps
        print(f"{name:32} first step {times[0]:6.2f} s, then {1e3 * mean:8.1f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"blocks": 8, "width": 256, "batch": 8, "length": 256, "steps": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--unrolled", action="store_true")
    given = parser.parse_args()
    params = init(jax.random.key(0), given.blocks, given.width, given.first)
    if given.unrolled:
        blocks = params["blocks"]
        params["blocks"] = [jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(given.blocks)]
    x = jax.random.normal(jax.random.key(1), (given.batch, given.length, given.width))
    for remat in (True, False):
        print(f"{'with' if remat else 'without'} jax.checkpoint")
        memory(make_loss(remat), params, x)
    if given.steps:
        step_time(make_loss(remat=False), params, x, given.steps)


main()
