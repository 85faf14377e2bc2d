"""The loss of sCM: restated in float64 from NVlabs' form of it, on a tiny network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training.distillation import consistency
from tests import toy as measures
from tests.training.distillation import toy

SIGMA, WARMUP = 0.5, 0.75  # sigma_data
STEP = 1e-5  # of central differences


def restated(task, params, rows, frozen):
    """Returns the loss, and a function that gives its derivative along a move of the parameters.

    States are multiplied by sigma_data, as NVlabs' are, and every derivative is a difference.
    """
    s, t, guidance = SIGMA, rows["angle"], rows["guidance"]
    (null, null_mask), text = frozen.null, (rows["embeddings"], rows["mask"])
    nothing = np.broadcast_to(null, text[0].shape), np.broadcast_to(null_mask, text[1].shape)
    sin, cos = (f(t)[:, None, None, None] for f in (np.sin, np.cos))

    def trigflow(module, params, x, t, text, *inputs):
        """diffusers' wrapper of the network, SanaSprintPipeline's."""
        time = np.sin(t) / (np.cos(t) + np.sin(t))
        flow = time[:, None, None, None]
        spread = np.sqrt(flow**2 + (1 - flow) ** 2)
        v = module.apply({"params": params}, x * spread, time, *text, *inputs)
        return ((1 - 2 * flow) * (x * spread) + (1 - 2 * flow + 2 * flow**2) * v) / spread

    def student(params, x, t):
        return np.asarray(trigflow(task.dit, params["dit"], x / s, t, text, guidance))

    def log_variance(params):
        embed, head = params["dit"]["time_embed"], params["log_variance"]
        features = [
            np.outer(u, 1e4 ** -(np.arange(128) / 128))
            for u in (np.sin(t) / (np.cos(t) + np.sin(t)), 0.1 * guidance)
        ]
        total = 0
        for angle, name in zip(features, ("linear", "guidance_linear"), strict=True):
            x = np.concatenate([np.cos(angle), np.sin(angle)], -1)
            x = x @ embed[f"{name}_1"]["kernel"] + embed[f"{name}_1"]["bias"]
            total += (
                x / (1 + np.exp(-x)) @ embed[f"{name}_2"]["kernel"] + embed[f"{name}_2"]["bias"]
            )
        values = 32**2 * 4  # of the native latents: it starts at the weight's logarithm
        start = np.log(1 / (s * np.tan(t)) / values)
        return start + (total @ head["kernel"] + head["bias"])[:, 0]

    x_t = cos * s * rows["latents"] + sin * s * rows["noise"]
    u, c = (
        np.asarray(trigflow(task.teacher, frozen.dit, x_t / s, t, each)) for each in (nothing, text)
    )
    dx = s * (u + guidance[:, None, None, None] * (c - u))
    along = cos * sin * dx, np.cos(t) * np.sin(t)
    ahead, behind = (student(params, x_t + h * along[0], t + h * along[1]) for h in (STEP, -STEP))
    jvp = (ahead - behind) / (2 * STEP)
    g = -(cos**2) * (s * student(params, x_t, t) - dx) - WARMUP * (cos * sin * x_t + s * jvp)
    g = g / (np.sqrt((g**2).sum((1, 2, 3), keepdims=True)) + 0.1)
    weight = 1 / (s * np.tan(t))
    squares, variance = (g**2).mean((1, 2, 3)), log_variance(params)
    loss = (weight / np.exp(variance) * squares + variance).mean()

    def derivative(move):
        ends = [jax.tree.map(lambda x, d, h=h: x + h * d, params, move) for h in (STEP, -STEP)]
        f = [student(end, x_t, t) for end in ends]
        v = [log_variance(end) for end in ends]
        d_f, d_v = ((ahead - behind) / (2 * STEP) for ahead, behind in (f, v))
        of_f = weight / np.exp(variance) * (-2 * g * d_f).mean((1, 2, 3))
        return (of_f + (1 - weight / np.exp(variance) * squares) * d_v).mean()

    return loss, derivative


def test_loss_and_gradient_are_those_restated_in_float64(monkeypatch):
    """The gradient along each kind of move; `jnp.float32` stands for float64 in the restatement."""
    task = toy.make_task(toy.dataclasses.replace(toy.FIGURES, adversarial=0.0))
    rng = np.random.default_rng(3)
    params = {"dit": toy.random_params(toy.STUDENT, 4)}
    params["log_variance"] = {"kernel": rng.standard_normal((16, 1)) / 4, "bias": np.ones(1)}
    batch = toy.make_batch()
    rows = batch | jax.tree.map(np.asarray, task._draw(jax.random.key(5), batch))
    loss = partial(task._student_loss, rows=rows, frozen=toy.frozen(), warmup=WARMUP)
    (found, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jax.tree.map(np.float32, params)
    )

    moves = [jax.tree.map(lambda x: rng.standard_normal(np.shape(x)), params) for _ in range(3)]
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        widen = partial(
            jax.tree.map,
            lambda x: np.float64(x) if np.asarray(x).dtype == np.float32 else np.asarray(x),
        )
        exact = toy.make_task(task.config, dtype="float64")
        expected, derivative = restated(
            exact, jax.tree.map(np.float64, params), widen(rows), widen(toy.frozen())
        )
        slopes = [derivative(move) for move in moves]
    assert found == pytest.approx(expected, rel=1e-5)
    for move, slope in zip(moves, slopes, strict=True):
        products = jax.tree.map(lambda g, d: np.vdot(np.float64(g), d), gradient, move)
        assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=1e-4)


def test_angles_are_those_of_log_normal_tangents():
    angles = consistency.draw_angles(jax.random.key(0), 20_000, -0.4, 1.2)
    logs = np.log(np.tan(np.asarray(angles, np.float64)) * SIGMA)
    assert logs.mean() == pytest.approx(-0.4, abs=0.03) and logs.std() == pytest.approx(
        1.2, abs=0.03
    )
    few = consistency.draw_angles(jax.random.key(0), 3, -0.4, 1.2)
    np.testing.assert_allclose(few, angles[:3], rtol=1e-6)  # whatever the batch


def test_the_true_velocity_points_at_the_data():
    rng = np.random.default_rng(0)
    data, noise = (jnp.asarray(rng.standard_normal((3, 2, 2, 4)), jnp.float32) for _ in range(2))
    angle = jnp.array([0.1, 0.8, np.pi / 2])
    x = consistency.state_at(angle, data, noise)
    rows = angle[:, None, None, None]
    velocity = jnp.cos(rows) * noise - jnp.sin(rows) * data
    measures.assert_close(consistency.data_of(angle, x, velocity), data, 1e-6)
