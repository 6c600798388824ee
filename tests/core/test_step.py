"""The step of the normalized recipe: its size is its own, whatever the scales that came in."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from optimizer_cases import LAYERS, leaves, mapped, params, steps, train

from singd_core import Convolution, LayerKind, Optimizer, TransposedConvolution, settings
from singd_core._settings import StepSettings
from singd_core.late import (
    BEGINNING,
    FADED,
    FORGET,
    GROWTH,
    LONGEST,
    MEMORY,
    NOISE,
    SETTLE,
    SHORTEST,
    TURN,
    VANISHED,
    Late,
)
from singd_core.length import OUTPUTS, SPECTRAL, TYPICAL, sized
from singd_core.levels import Levels

STRUCTURES = ["dense", "diagonal", "blockdiagonal:2", "triltoeplitz", "hierarchical:1,1"]

# Relative to the largest entry, float64: scales that are no powers of two round otherwise, and the
# roots of sums of squares lose half of what leaves the range of neither.
CLOSE = 1e-9


def decayed() -> StepSettings:
    """The settings of a step whose rate a schedule has halved, with the momentum of before."""
    return StepSettings(**vars(settings("normalized")), share=0.5)


def nothing_late() -> Late:
    """Sums over gradients before the first, as numbers."""
    return Late(*(0.0 for _ in Late.field_names()))


def changes(scale: float, n: int = 4, **given: Any) -> list[np.ndarray]:
    """What the layers' parameters have moved by after some steps of a loss times `scale`."""
    start = params()
    data = [
        (
            mapped(lambda x: x * scale, g),
            {name: (x, z * scale) for name, (x, z) in rows.items()},
        )
        for g, rows in steps(n)
    ]
    end, state = train(Optimizer(LAYERS, **given), data, start)
    assert state.skipped == 0
    names = list(state.layers)
    old, new = ({name: p[name] for name in names} for p in (start, end))
    return [b - a for a, b in zip(leaves(old), leaves(new), strict=True)]


def assert_alike(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * np.max(np.abs(b)))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_scale_of_the_loss_changes_no_step(structure: str, scale: float) -> None:
    given = {"structures": (structure, structure)}
    assert_alike(changes(scale, **given), changes(1.0, **given))


@pytest.mark.parametrize("exponent", range(-45, 0, 3))
def test_steps_are_no_longer_where_squares_of_gradients_leave_the_range(exponent: int) -> None:
    n = np.full((9, 12), 10.0**exponent, dtype=np.float32)  # of a gradient whose norm is known
    found = sized(decayed(), np.ones_like(n), lambda ahead: n, 1.0, 108.0, None)
    step = float(found.scale) * n.astype(np.float64)
    assert np.linalg.norm(step) <= 1.0 + 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nor_does_it_with_kfac(scale: float) -> None:
    assert_alike(changes(scale, kfac=True), changes(1.0, kfac=True))


@pytest.mark.parametrize("loss_average", ["batch+sequence", None])
def test_what_the_loss_is_a_mean_of_changes_no_step(loss_average: str | None) -> None:
    assert_alike(changes(1.0, loss_average=loss_average), changes(1.0, loss_average="batch"))


def test_a_first_step_has_the_size_that_the_page_says() -> None:
    rng = np.random.default_rng(0)
    W, x, z = rng.standard_normal((5, 3)), rng.standard_normal((8, 3)), rng.standard_normal((8, 5))
    optimizer = Optimizer(lr=0.1, warmup=0)
    p = {"W": W}
    updates, _ = optimizer.update({"W": z.T @ x}, optimizer.init(p), p, {"W": (x, z)})
    t_U = np.mean(x**2)
    R = np.sqrt(SPECTRAL / np.sqrt(5) * OUTPUTS / np.sqrt(3 * t_U))
    np.testing.assert_allclose(np.sqrt(np.mean(updates["W"] ** 2)), 0.1 * R, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "overlap"),
    [
        (Convolution((3, 5)), 15.0),
        (Convolution((3, 5), stride=(2, 5)), 1.5),
        (Convolution((2, 2), stride=4), 1.0),
        (Convolution((3, 5), groups=2, dilation=2), 15.0),
        (TransposedConvolution((3, 5), stride=(2, 1)), 7.5),
    ],
)
def test_a_step_of_a_convolution_is_sized_by_the_norm_of_the_layer(
    kind: LayerKind, overlap: float
) -> None:
    """A pixel takes part in several patches, so the layer's norm is larger than its matrix's."""
    rng = np.random.default_rng(0)
    p = {"W": rng.standard_normal((4, 4, *kind.kernel_size))}
    g = {"W": rng.standard_normal(p["W"].shape)}
    optimizer = Optimizer({"W": kind}, lr=0.1, warmup=0)
    updates, _ = optimizer.update(g, optimizer.init(p), p)
    _, d_out, d_in = kind.shape(p["W"].shape, False)
    spectral = SPECTRAL / np.sqrt(overlap * max(d_out, d_in))
    size = 0.1 * np.sqrt(spectral * OUTPUTS / np.sqrt(d_in * TYPICAL))
    np.testing.assert_allclose(np.sqrt(np.mean(updates["W"] ** 2)), size, rtol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_no_input_passes_a_convolution_larger_than_that(stride: int) -> None:
    """‖W * x‖ ≤ √overlap ‖W‖₂ ‖x‖, nearly reached by an even input and an even kernel."""
    kind, W = Convolution((4, 4), stride=stride), np.ones((1, 1, 4, 4))
    A, _ = kind.inputs(np.ones((1, 1, 64, 64)), bias=False, kfac_approx="expand")
    passed = np.linalg.norm(A @ kind.matrix(W).T) / 64
    bound = np.sqrt(kind.overlap) * np.linalg.norm(kind.matrix(W), 2)
    assert 0.9 * bound < passed <= bound


def test_without_rows_the_size_is_of_typical_inputs() -> None:
    """Factors that saw nothing are the identity, and the step is the momentum's alone."""
    optimizer, p = Optimizer(lr=0.1, warmup=0), {"W": np.zeros((5, 3))}
    g = np.random.default_rng(0).standard_normal((5, 3))
    updates, _ = optimizer.update({"W": g}, optimizer.init(p), p)
    size = 0.1 * np.sqrt(SPECTRAL / np.sqrt(5) * OUTPUTS / np.sqrt(3 * TYPICAL))
    np.testing.assert_allclose(updates["W"], -size * g / np.sqrt(np.mean(g**2)), rtol=1e-12)


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_the_momentum_forgets_faster_where_the_rate_has_decayed(recipe: str) -> None:
    """At a half of the largest rate, α₂ is 0.9^1.5: equation 5.8b."""
    p, data = params(), steps(4)
    given: dict[str, Any] = {"recipe": recipe, "warmup": 0}
    optimizer = Optimizer(LAYERS, lr=0.1, **given)
    _, state = train(optimizer, data[:2], p)
    assert state.largest_lr == 0.1
    lower = Optimizer(LAYERS, lr=0.05, fallback=optimizer.fallback, **given)
    g, rows = data[2]
    found, after = lower.update(g, state, p, rows)
    assert after.largest_lr == 0.1

    shorter = {"momentum": 0.9**1.5} if recipe == "normalized" else {}
    alone = Optimizer(LAYERS, lr=0.05, fallback=optimizer.fallback, **shorter, **given)
    fresh = dataclasses.replace(state, largest_lr=0.0)
    expected, after = alone.update(g, fresh, p, rows)
    assert_alike(leaves(found), leaves(expected))
    assert after.largest_lr == 0.05
    higher = Optimizer(LAYERS, lr=0.2, fallback=optimizer.fallback, **given)
    assert higher.update(g, state, p, rows)[1].largest_lr == 0.2


def test_a_rate_in_an_array_of_integers_keeps_the_largest_one() -> None:
    """As the last one of a schedule is."""
    p, (g, rows) = params(), steps(1)[0]
    state = Optimizer(LAYERS, lr=0.9).init(p)
    for lr, skipped in ((0.9, 0), (np.asarray(0), 0), (np.int64(0), 0), (0.9, 0)):
        _, state = Optimizer(LAYERS, lr=lr).update(g, state, p, rows)
        assert int(state.skipped) == skipped
        np.testing.assert_allclose(state.largest_lr, 0.9, rtol=1e-7)


@pytest.mark.slow
def test_a_dead_matrix_does_not_walk() -> None:
    """Its momentum goes on for ever, and would at full size."""
    optimizer, p = Optimizer(LAYERS), params()
    p, state = train(optimizer, steps(3), p)
    g, rows = steps(4)[3]
    for name in rows:
        g |= {name: mapped(np.zeros_like, g[name])}
    dead = {name: mapped(np.copy, p[name]) for name in rows}
    for _ in range(10_000 // len(rows)):
        updates, state = optimizer.update(g, state, p)
        p = optimizer.apply(p, updates)
    assert state.skipped == 0
    for name, before in dead.items():
        assert all(map(np.array_equal, leaves(p[name]), leaves(before)))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("sizes", ["equal", "one large among many"])
def test_gradients_with_nothing_in_common_agree_like_noise(nesterov: bool, sizes: str) -> None:
    """Whatever their norms are: one large gradient agrees with itself alone."""
    s = dataclasses.replace(settings("normalized"), nesterov=nesterov)
    rng, m, found = np.random.default_rng(0), 0.0, []
    late = nothing_late()
    for t in range(300):
        g = rng.standard_normal(10_000)
        g *= 1.0 if sizes == "equal" or t % 25 else 100.0
        m = s.momentum * m + g
        late = late.update(g @ g, s)
        ahead = g + s.momentum * m if nesterov else m
        found.append(float(late.over_noise(np.linalg.norm(ahead), g @ g, s)))
    np.testing.assert_allclose(found, 1.0, atol=0.1)


def test_equal_gradients_agree_more_than_noise() -> None:
    s, late, m = settings("normalized"), nothing_late(), 0.0
    for _ in range(300):
        late, m = late.update(1.0, s), s.momentum * m + 1.0
    alpha = s.momentum
    b = np.array([1.0 + alpha, *(alpha ** np.arange(2, 400))])
    expected = b.sum() ** 2 / (b @ b)
    assert late.over_noise(1.0 + alpha * m, 1.0, s) == pytest.approx(expected)


def test_steps_grow_while_gradients_agree_and_shrink_where_they_oppose() -> None:
    s = decayed()
    late = nothing_late()
    growths = []
    for ratio in [13.0] * 60 + [0.0] * 60:
        late = late.update(1.0, s).grown(ratio, 1.0, 1.0, True, s)
        growths.append(late.growth)
    assert growths[:15] == [0.0] * 15  # sums that have just begun say little
    assert growths[59] == LONGEST
    assert growths[-1] == -LONGEST


def test_steps_are_no_longer_where_gradients_vanish() -> None:
    """They agree there, as where a network fits all its data, and weights would be carried away."""
    s, late, found = decayed(), nothing_late(), {}
    for t in range(1, 901):
        late = late.update(10.0 ** (-2 * t / 100), s)  # ‖∇W‖ is a tenth after 100 steps
        late = late.grown(13.0, late.smaller(), late.squares, True, s)
        found[t] = late.growth, late.smaller()
    assert found[100][0] == LONGEST
    for t in (260, 320):
        growth, smaller = found[t]
        assert 0.0 < growth < LONGEST
        assert growth == pytest.approx(VANISHED + 0.5 * np.log(smaller))
    assert found[900][0] == 0.0
    short = dataclasses.replace(late, growth=-1.0)
    assert short.grown(1.0, 0.0, 1.0, True, s).growth == -1.0  # which is no longer than it was


def test_longer_steps_take_clearer_signs() -> None:
    """A little more agreement than noise makes steps longer, but not much; noise keeps them so."""
    s, late = decayed(), nothing_late()

    def after(ratio: float, late: Late) -> Late:
        for _ in range(300):
            late = late.update(1.0, s).grown(ratio, 1.0, 1.0, True, s)
        return late

    assert float(after(1.7, late).growth) == float(after(0.7, late).growth) == 0.0
    longer = after(2.4, late)
    assert float(longer.growth) == pytest.approx(0.6 / 1.2 * 2.0, rel=1e-3)
    assert after(1.0, longer).growth == longer.growth
    assert float(after(0.7, longer).growth) == pytest.approx(0.1 / 0.4 * 2.0, rel=1e-3)


def test_steps_become_shorter_where_gradients_turn() -> None:
    """Far below noise they go to and fro; above, short steps stay short until gradients agree."""
    s, late = decayed(), nothing_late()

    def after(ratio: float, steps: int, late: Late) -> Late:
        for _ in range(steps):
            late = late.update(1.0, s).grown(ratio, 1.0, 1.0, True, s)
        return late

    late = after(1.0, 30, late)
    assert after(1.01 * TURN, 10, late).growth == 0.0
    short = after(0.6 * TURN, 10, late)
    assert float(short.growth) == pytest.approx(-10 * GROWTH * 0.4)
    assert after(1.01 * TURN, 10, short).growth == short.growth == after(1.7, 10, short).growth
    assert float(after(2.3, 2, short).growth - short.growth) == pytest.approx(2 * GROWTH * 0.5)


def test_at_a_constant_rate_steps_settle_in_noise() -> None:
    """They become shorter as a power of time, unless gradients become smaller by themselves."""
    s, late = StepSettings(**vars(settings("normalized"))), nothing_late()
    found = {}
    for t in range(1, 4001):
        late = late.update(1.0, s).grown(0.3, 1.0, 1.0, True, s)
        found[t] = late.growth
    for t in (100, 400, 2000):
        assert found[2 * t] - found[t] == pytest.approx(-SETTLE * np.log(2.0), rel=0.01)
    before, smaller = late.growth, late
    for _ in range(100):
        smaller = smaller.update(1.0, s).grown(0.3, 0.1, 1.0, True, s)
        late = late.update(1.0, s).grown(0.3, 1.0, 1.0, True, s)
    assert before - smaller.growth == pytest.approx(0.1 * (before - late.growth))
    assert late.grown(NOISE, 1.0, 1.0, True, s).growth == late.growth


def test_a_gradient_that_is_zero_says_nothing_of_the_size() -> None:
    s, late = StepSettings(**vars(settings("normalized"))), nothing_late()
    for ratio in (13.0, 0.0):
        for _ in range(25):
            late = late.update(1.0, s).grown(ratio, 1.0, 1.0, True, s)
        same = late.update(0.0, s).grown(0.0, 1.0, 0.0, False, s)
        assert same.growth == late.growth != 0.0


@pytest.mark.parametrize("share", [0.9 * FADED, 1.1 * FADED])
def test_gradients_that_have_faded_make_no_step_longer(share: float) -> None:
    """Their average is of earlier ones that agreed, as where a network fits its data at once."""
    s, late = StepSettings(**vars(settings("normalized"))), nothing_late()
    for ratio in (*(1.0,) * 25, *(2.3,) * 3):
        late = late.update(1.0, s).grown(ratio, 1.0, 1.0, True, s)
    longer, shorter = (
        late.grown(ratio, 1.0, share * late.squares, True, s) for ratio in (13.0, 0.0)
    )
    assert shorter.growth < late.growth
    assert (longer.growth > late.growth) == (share > FADED)


def test_at_a_constant_rate_noise_forgets_that_steps_were_longer() -> None:
    s, late = StepSettings(**vars(settings("normalized"))), nothing_late()
    for _ in range(200):
        late = late.update(1.0, s).grown(13.0, 1.0, 1.0, True, s)
    assert late.growth == LONGEST  # while gradients agree
    grown = []
    for _ in range(100):
        late = late.update(1.0, s).grown(NOISE, 1.0, 1.0, True, s)
        grown.append(late.growth)
    ratios = np.divide(grown[51:], grown[50:-1])
    np.testing.assert_allclose(ratios, 1.0 - FORGET, rtol=1e-6)
    assert grown[-1] < 0.1 * LONGEST


def test_noise_does_not_change_the_size() -> None:
    s, late = decayed(), nothing_late()
    for _ in range(60):
        late = late.update(1.0, s).grown(1.0, 1.0, 1.0, True, s)
    assert late.growth == 0.0


def test_steps_shrink_with_the_gradient_after_the_beginning() -> None:
    s, late, found = settings("normalized"), nothing_late(), []
    for t in range(1, 1001):
        late = late.update(10.0 ** (-2 * t / 200), s)  # ‖∇W‖ is a tenth after 200 steps
        found.append(late.longer(late.smaller()))
        if t == BEGINNING + 1:
            squares = 10.0 ** (-2 * np.arange(1, t + 1) / 200)
            b = s.momentum ** np.arange(t)[::-1]
            expected = np.sqrt((b @ squares) / b.sum() / squares.mean())
            assert found[-1] == pytest.approx(expected, rel=1e-6)
    assert found[: int(BEGINNING)] == [1.0] * int(BEGINNING)
    assert found[-1] == SHORTEST


def test_a_schedule_takes_the_place_of_shorter_steps() -> None:
    """What a rate has become smaller by already is no reason to make steps shorter."""
    s, late = settings("normalized"), nothing_late()
    for t in range(int(MEMORY)):
        late = late.update(1.0 if t < 500 else 0.09, s)
    shorter = late.longer(late.smaller())
    assert SHORTEST < 0.3 < shorter < 0.5
    assert late.longer(late.smaller(), 0.8) == pytest.approx(shorter / 0.8)
    assert [late.longer(late.smaller(), share) for share in (shorter, 0.3, 0.1, 0.0)] == [1.0] * 4


def test_gradients_of_long_ago_are_forgotten() -> None:
    s, late = settings("normalized"), nothing_late()
    for t in range(3 * int(MEMORY)):
        late = late.update(100.0 if t < MEMORY else 1.0, s)
    mean = 1.0 + 99.0 * (1.0 - 1.0 / MEMORY) ** (2 * MEMORY)
    assert late.longer(late.smaller()) == pytest.approx(mean**-0.5, rel=1e-6)


def test_steps_do_not_shrink_while_gradients_keep_their_size_or_grow() -> None:
    s, late = settings("normalized"), nothing_late()
    for t in range(1000):
        late = late.update(1.0 + t, s)
        assert late.longer(late.smaller()) == 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_how_much_they_shrink_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    s, late, other = settings("normalized"), nothing_late(), nothing_late()
    for t in range(int(BEGINNING) + 50):
        late, other = late.update(0.97**t, s), other.update(scale * 0.97**t, s)
    assert 0.0 < late.longer(late.smaller()) < 1.0
    assert other.longer(other.smaller()) == pytest.approx(late.longer(late.smaller()), rel=1e-6)


@pytest.mark.parametrize("scale", [2e-20, 1e-3, 1e16])
def test_levels_do_not_depend_on_the_scale_of_the_natural_gradient(scale: float) -> None:
    """The shares of its squares stay in the range of float32."""
    n = np.random.default_rng(0).standard_normal((2, 1500)).astype(np.float32)
    even = Levels.even((), *n.shape, like=n)
    found, expected = (even.measured(np.float32(c) * n, 1.0) for c in (scale, 1.0))
    for a, b in zip(found.sides, expected.sides, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)  # squares below the smallest normal number
