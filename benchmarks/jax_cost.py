"""What a step costs in JAX: temporary memory, and processor time to compile and to run.

A transformer of equal blocks in a scan, with `jax.checkpoint` and without, in float32; with
`--first` behind a linear layer, so that the scan does not begin with the batch itself; with
`--unrolled` each block has parameters of its own. Steps of optax are timed beside them, and with
`--unrolled` steps of kfac-jax, if it is installed (0.0.8 fails with jax 0.10; its repository's head
of August 2026, babd853, works). kfac-jax does not find the layers of a scan.

    python benchmarks/jax_cost.py [--blocks 8] [--width 256] [--batch 8] [--length 256] [--steps 0]
        [--repeats 3] [--first] [--unrolled]
    python benchmarks/jax_cost.py --agent

Times to compile are medians of the repeats, in which all are compiled in turn; none with
`--repeats 0`. `--agent` has the memory of the gradient of PPO alone, with an actor and a critic of
two hidden layers.
"""

import argparse
import functools
import importlib.util
import itertools
import statistics
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


def make_loss(remat, heads=4, tell=lambda y: None):
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
        y = jnp.tanh(y)
        tell(y.reshape(len(y), -1))
        return jnp.mean(jnp.sum((y - 0.3) ** 2, axis=(1, 2)))

    return loss


def compiled(function, *args):
    """MiB of temporary memory, and the seconds of processor time to trace and to compile."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(lambda *args: function(*args)).lower(*args)
    traced = time.process_time()
    done = lowered.compile()
    times = traced - start, time.process_time() - traced
    return done.memory_analysis().temp_size_in_bytes / 2**20, *times


def report(cases, repeats):
    """A line for each function with its arguments, beside the first."""
    found = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (function, *args) in cases.items():
            found[name].append(compiled(function, *args))
    base = None
    for name, runs in found.items():
        temp, trace, compile_ = (statistics.median(column) for column in zip(*runs, strict=True))
        total = statistics.median(run[1] + run[2] for run in runs)
        base = base or (temp, total)
        more = f"{100 * (temp / base[0] - 1):+6.1f} %" if base[0] >= 1 else ""  # of the gradient
        print(
            f"{name:32} {temp:8.1f} MiB {more:8}  trace {trace:5.2f} s  compile {compile_:6.2f} s"
            f" = {total / base[1]:5.2f} x",
            flush=True,
        )


def gradients(loss, params, x):
    """The gradient, and the gradient with the curvature."""
    cases = {"gradient": (jax.value_and_grad(loss), params, x)}
    for structures in (None, "diagonal", "dense"):
        layers = singd_jax.find_layers(loss, structures=structures)(params, x)
        for T in (1, 10):
            state = jax.eval_shape(
                singd_jax.singd(layers=layers, T=T, growing_T=False).init, params
            )
            function = singd_jax.value_and_curvature(loss, layers)
            cases[f"{structures or 'default'}, T={T}"] = function, params, state, x
    return cases


def updates(loss, params, x):
    """The update of each optimizer without the gradient."""
    cases = {}
    for name, tx in of_optax().items():
        cases[f"update of {name}"] = tx.update, params, jax.eval_shape(tx.init, params), params
    for structures in (None, "diagonal", "dense"):
        layers = singd_jax.find_layers(loss, structures=structures)(params, x)
        tx = singd_jax.singd(layers=layers)
        state = jax.eval_shape(tx.init, params)
        both = singd_jax.value_and_curvature(loss, layers)
        _, grads, curvature = jax.eval_shape(both, params, state, x)

        def update(grads, state, params, curvature, tx=tx):
            return tx.update(grads, state, params, curvature=curvature)

        name = f"update, {structures or 'default'}"
        cases[name] = update, grads, state, params, curvature
    return cases


def of_optax():
    """Optimizers of optax, those that this version has."""
    found = {"adamw": optax.adamw(1e-3)}
    for name in ("muon", "soap"):
        if hasattr(optax.contrib, name):
            found[name] = getattr(optax.contrib, name)(1e-3)
    return found


def steps_of_optax(loss, params, x):
    """Of each optimizer: its whole step and its first state. singd's gaps do not grow."""
    layers = singd_jax.find_layers(loss)(params, x)
    optimizers = of_optax()
    plain = list(optimizers)
    for structures in (None, "diagonal", "dense"):
        for T in (1, 10):
            optimizers[f"{structures or 'default'}, T={T}"] = singd_jax.singd(
                layers=layers, structures=structures, T=T, growing_T=False
            )
    for name, tx in optimizers.items():

        def step(params, state, x, tx=tx, name=name):
            if name in plain:
                _, grads = jax.value_and_grad(loss)(params, x)
                updates, state = tx.update(grads, state, params)
            else:
                function = singd_jax.value_and_curvature(loss, layers)
                _, grads, curvature = function(params, state, x)
                updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state

        yield name, step, tx.init(params)


def steps_of_kfac_jax(params, x):
    """The same with kfac-jax, whose factors change in each step and whose inverses every T."""
    import kfac_jax

    def tell(y):
        kfac_jax.register_normal_predictive_distribution(y, jnp.full(y.shape, 0.3))

    for T in (1, 10):
        tx = kfac_jax.Optimizer(
            jax.value_and_grad(make_loss(remat=False, tell=tell)),
            l2_reg=0.0,
            learning_rate_schedule=lambda step: 1e-3,
            momentum_schedule=lambda step: 0.9,
            damping_schedule=lambda step: 1e-3,
            inverse_update_period=T,
            num_burnin_steps=0,
            multi_device=False,
        )
        key = jax.random.key(2)

        def step(params, state, x, tx=tx, key=key):
            with tx.staging_context():  # it is compiled as part of this step
                return tx.step(params, state, key, batch=x, global_step_int=1)[:2]

        yield f"kfac-jax, T={T}", step, tx.init(params, key, x)


def report_steps(cases, params, x, steps):
    """A line for each: temporary memory, time to compile, and the mean of the steps after."""
    for name, step, state in cases:
        jax.clear_caches()
        start = time.process_time()
        run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        first = time.process_time() - start
        now = jax.tree.map(jnp.copy, params)  # as it is given away
        now, state = jax.block_until_ready(run(now, state, x))
        start = time.process_time()  # others on the machine do not count
        for _ in range(steps):
            now, state = jax.block_until_ready(run(now, state, x))
        mean = (time.process_time() - start) / steps
        temp = run.memory_analysis().temp_size_in_bytes / 2**20
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
        print(
            f"{name:20} state {kept:6.1f} MiB  temporary {temp:7.1f} MiB"
            f"  trace and compile {first:6.2f} s  a step {1e3 * mean:8.1f} ms",
            flush=True,
        )


def agent(units, batch, observed=17, actions=6):
    """The loss of PPO with a small network, its parameters and its batch."""

    def mlp(key, d_out):
        sides = (observed, units), (units, units), (units, d_out)
        keys = jax.random.split(key, len(sides))
        return [
            {"w": jax.random.normal(k, own) / own[0] ** 0.5, "b": jnp.zeros(own[1])}
            for k, own in zip(keys, sides, strict=True)
        ]

    def apply(layers, x):
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ layers[-1]["w"] + layers[-1]["b"]

    def loss(params, x):
        z = (x["action"] - apply(params["actor"], x["seen"])) * jnp.exp(-params["log_std"])
        ratio = jnp.exp(jnp.sum(-0.5 * z**2 - params["log_std"], -1) - x["log_p"])
        gain = jnp.minimum(x["gain"] * ratio, x["gain"] * jnp.clip(ratio, 0.8, 1.2))
        value = apply(params["critic"], x["seen"])[:, 0]
        near = x["value"] + jnp.clip(value - x["value"], -0.2, 0.2)
        errors = jnp.maximum((value - x["return"]) ** 2, (near - x["return"]) ** 2)
        return 0.5 * errors.mean() - gain.mean() - 0.01 * jnp.sum(params["log_std"])

    keys = jax.random.split(jax.random.key(0), 2)
    params = {"actor": mlp(keys[0], actions), "critic": mlp(keys[1], 1)}
    shapes = {"seen": (batch, observed), "action": (batch, actions)}
    shapes |= dict.fromkeys(("log_p", "gain", "value", "return"), (batch,))
    x = {name: jax.random.normal(jax.random.key(1), shape) for name, shape in shapes.items()}
    return loss, params | {"log_std": jnp.zeros(actions)}, x


def report_agents():
    """Temporary memory of the gradient, and how much more the curvature takes."""
    for units, batch in itertools.product((64, 256), (128, 256, 512, 2048)):
        loss, params, x = agent(units, batch)
        base, *_ = compiled(jax.value_and_grad(loss), params, x)
        told = []
        for structures in (None, "diagonal", "dense"):
            layers = singd_jax.find_layers(loss, structures=structures)(params, x)
            state = jax.eval_shape(singd_jax.singd(layers=layers).init, params)
            temp, *_ = compiled(singd_jax.value_and_curvature(loss, layers), params, state, x)
            told.append(f"{structures or 'default'} {100 * (temp / base - 1):+5.1f} %")
        print(f"{units:4} units, batch {batch:5} {base:7.2f} MiB", *told, sep="  ", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"blocks": 8, "width": 256, "batch": 8, "length": 256, "steps": 0, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("first", "unrolled", "agent"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    if given.agent:
        report_agents()
        return
    params = init(jax.random.key(0), given.blocks, given.width, given.first)
    if given.unrolled:
        blocks = params["blocks"]
        params["blocks"] = [jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(given.blocks)]
    x = jax.random.normal(jax.random.key(1), (given.batch, given.length, given.width))
    if given.repeats:
        for remat in (True, False):
            print(f"{'with' if remat else 'without'} jax.checkpoint")
            report(gradients(make_loss(remat), params, x), given.repeats)
        print("without the gradient")
        report(updates(make_loss(remat=False), params, x), given.repeats)
    if given.steps:
        print("whole steps")
        report_steps(steps_of_optax(make_loss(remat=False), params, x), params, x, given.steps)
        if given.unrolled and importlib.util.find_spec("kfac_jax"):
            report_steps(steps_of_kfac_jax(params, x), params, x, given.steps)


if __name__ == "__main__":
    main()
