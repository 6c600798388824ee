"""Training in JAX: SINGD at its default rate beside AdamW, Muon and kfac-jax at their best ones.

Two small networks on the digits of scikit-learn, 300 steps of 128 examples, a linear decay of the
rate. A rival has the best of its settings for each task, which seed 0 chose; AdamW and Muon have a
warm-up of 20 steps. kfac-jax also runs with the rate, the momentum and the damping that it adapts
by itself. Losses are of all training examples: means of the seeds 2 to 4.

    python benchmarks/jax_compare.py

kfac-jax is left out where it is not installed; see jax_cost.py for the version that works.
"""

import functools
import importlib.util
import itertools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from sklearn.datasets import load_digits

import singd_jax

STEPS, BATCH, WARM_UP = 300, 128, 20
SEARCH, CONFIRM = 0, (2, 3, 4)
RATES = {
    "AdamW": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    "Muon": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "kfac-jax": tuple(itertools.product((0.03, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0, 10.0))),
    "kfac-jax, adaptive": (0.001, 0.01, 0.1, 1.0, 10.0),  # the damping that it begins with
}


def network(key, sides):
    keys = jax.random.split(key, len(sides) - 1)
    pairs = zip(keys, sides, sides[1:], strict=False)
    return [{"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)} for k, a, b in pairs]


def classify(params, batch, tell=None):
    """The cross entropy of a perceptron."""
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    if tell is not None:
        tell.register_softmax_cross_entropy_loss(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def encode(params, batch, tell=None):
    """The squared error of an autoencoder, summed over pixels."""
    x = batch[0]
    for i, layer in enumerate(params, 1):
        x = x @ layer["w"] + layer["b"]
        x = x if i in (len(params) // 2, len(params)) else jnp.tanh(x)
    if tell is not None:
        tell.register_normal_predictive_distribution(x, batch[0])
    return jnp.mean(jnp.sum((x - batch[0]) ** 2, axis=1))


TASKS = {
    "perceptron": (classify, (64, 128, 64, 10)),
    "autoencoder": (encode, (64, 64, 32, 16, 32, 64, 64)),
}


@functools.cache
def data():
    """The pixels and labels of the training examples."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:1400]
    return jnp.asarray(digits.data[order] / 16, jnp.float32), jnp.asarray(digits.target[order])


def by_optax(make, loss, params, batches):
    """Train with a transformation of optax, and return the parameters after each step."""
    tx, ours = make(loss), make is by_rows
    gradient = singd_jax.value_and_grad(loss) if ours else jax.value_and_grad(loss)
    state = tx.init(params, batches[0]) if ours else tx.init(params)

    @jax.jit
    def step(params, state, batch):
        extra = (state,) if ours else ()
        _, grads = gradient(params, *extra, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
        yield params


def by_rows(loss):
    return singd_jax.singd(optax.linear_schedule(0.12, 0.0, STEPS), loss=loss)


def by_gradients(loss):
    return singd_jax.singd(optax.linear_schedule(0.12, 0.0, STEPS))


def adamw(rate, loss):
    return optax.adamw(schedule(rate))


def muon(rate, loss):
    return optax.contrib.muon(schedule(rate))


def schedule(rate):
    decay = optax.linear_schedule(rate, 0.0, STEPS)
    return lambda step: decay(step) * jnp.minimum(1.0, (step + 1) / WARM_UP)


def by_kfac_jax(given, loss, params, batches):
    import kfac_jax

    told = functools.partial(loss, tell=kfac_jax)
    tx = kfac_jax.Optimizer(
        jax.value_and_grad(told), l2_reg=0.0, num_burnin_steps=0, multi_device=False, **given
    )
    key = jax.random.key(1)
    state = tx.init(params, key, batches[0])
    for i, batch in enumerate(batches):
        key, own = jax.random.split(key)
        params, state, _ = tx.step(params, state, own, batch=batch, global_step_int=i)
        yield params


OURS = {"SINGD": by_rows, "SINGD without rows": by_gradients}


def chosen(method, setting):
    """What trains with a method at one of its settings."""
    if method in OURS:
        return functools.partial(by_optax, OURS[method])
    if method in ("AdamW", "Muon"):
        make = functools.partial({"AdamW": adamw, "Muon": muon}[method], setting)
        return functools.partial(by_optax, make)
    if method == "kfac-jax":
        rate, damping = setting
        given = {
            "learning_rate_schedule": optax.linear_schedule(rate, 0.0, STEPS),
            "momentum_schedule": lambda step: 0.9,
            "damping_schedule": lambda step: damping,
        }
    else:
        adaptive = ("learning_rate", "momentum", "damping")
        given = {f"use_adaptive_{name}": True for name in adaptive} | {"initial_damping": setting}
    return functools.partial(by_kfac_jax, given)


def train(task, method, setting, seed):
    """The final loss, and the processor milliseconds of a step after the first fifty."""
    loss, sides = TASKS[task]
    x, labels = data()
    draw = np.random.default_rng(seed)
    picks = [draw.choice(len(x), BATCH, replace=False) for _ in range(STEPS)]
    batches = [(x[i], labels[i]) for i in picks]
    params, start = network(jax.random.key(seed), sides), 0.0
    for i, params in enumerate(chosen(method, setting)(loss, params, batches)):  # noqa: B020
        if i == 49:
            jax.block_until_ready(params)
            start = time.process_time()
    jax.block_until_ready(params)
    ms = 1e3 * (time.process_time() - start) / (STEPS - 50)
    end = float(loss(params, (x, labels)))
    return (end if math.isfinite(end) else math.inf), ms


def main():
    methods = [*OURS, *RATES]
    if importlib.util.find_spec("kfac_jax") is None:
        methods = [method for method in methods if not method.startswith("kfac-jax")]
    for task, method in itertools.product(TASKS, methods):
        best = None
        if method in RATES:
            best = min(RATES[method], key=lambda one: train(task, method, one, SEARCH)[0])
        losses, times = zip(*(train(task, method, best, seed) for seed in CONFIRM), strict=True)
        ends = [loss for loss in losses if math.isfinite(loss)]
        lost = f", {len(losses) - len(ends)} diverged" if len(ends) < len(losses) else ""
        spread = f"{statistics.mean(ends):.3g} ± {statistics.pstdev(ends):.1g}" if ends else "none"
        ms = statistics.mean(times)
        print(f"{task:12} {method:20} {best!s:12} {spread}{lost}  {ms:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
