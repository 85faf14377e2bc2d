"""The train step of text to image, on networks that compile in seconds."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax import sharding
from sana_jax.checkpoints.components import init_params, module_for
from sana_jax.diffusion import ddpm, flow_matching
from sana_jax.diffusion.flow_matching import NoiseConfig
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.models.remat import REMAT
from sana_jax.runtime.errors import UserError
from sana_jax.text.prompts import tokenize
from sana_jax.text.tokenizers import toy_tokenizer
from sana_jax.training.loop import compile_step
from sana_jax.training.optimizers.optimizers import OptimizerConfig
from sana_jax.training.state import on_mesh
from sana_jax.training.text_to_image.task import Frozen, Recipe, TextToImageTask

DIT = SanaConfig(
    depth=1, width=64, head_dim=16, latent_channels=4, cross_heads=4, caption_channels=32
)
GEMMA = Gemma2Config(
    vocab_size=640,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    query_pre_attn_scalar=8,
)
ROWS = 8
CAPTIONS = ["a red cat", "two dogs", "", "blue", "a b c d e f g h i j", "x", "house", "sky"]
ADAMW = OptimizerConfig(learning_rate=1e-3, eps=1e-6, clip_norm=1.0)
TOKENIZER = toy_tokenizer()


def captions(instruction=None):
    told = tokenize(TOKENIZER, CAPTIONS, ROWS, instruction, True)
    empty = tokenize(TOKENIZER, [""], ROWS, None, True)
    return told, SimpleNamespace(prefix=told.prefix, window=told.window, empty=empty)


@functools.cache  # a task's programs are compiled once
def make_task(recipe, train=True, instruction=None, remat="none", unroll=1, network=DIT):
    dit = dataclasses.replace(module_for(network, "float32"), remat=remat, unroll=unroll)
    encoder = dataclasses.replace(module_for(GEMMA, "float32"), trains=train, unroll=unroll)
    return TextToImageTask(recipe, dit, None, encoder, captions(instruction)[1], train)


@functools.cache
def programs(task, mesh):
    """Returns (the step, the function that makes its first state)."""
    with jax.set_mesh(mesh):
        abstract, create = on_mesh(lambda: task.init(jax.random.key(0)), mesh)
    return compile_step(task.step, abstract), create


def make_batch(instruction=None):
    told, _ = captions(instruction)
    latents = np.random.default_rng(0).standard_normal((8, 4, 4, 4)).astype(np.float32)
    return {"latents": latents, "tokens": told.tokens, "mask": told.mask}


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def start_of(task):
    """Returns the state that `run` starts from."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        return programs(task, mesh)[1]()


@functools.cache
def encoder_params():
    init = functools.partial(init_params, module_for(GEMMA, "float32"))
    return nn.unbox(jax.jit(init)(jax.random.key(5)))


def run(task, steps, batch, frozen, mesh=None):
    """Returns (the state, the losses) after so many steps on one batch."""
    mesh = mesh or one_device()
    step, create = programs(task, mesh)
    with jax.set_mesh(mesh):
        put = sharding.batch_sharding(mesh)
        batch = jax.tree.map(lambda x: jax.device_put(x, put), batch)
        state, losses = create(), []
        for _ in range(steps):
            state, metrics = step(state, batch, frozen)
            losses.append(float(metrics["loss"]))
    return state, np.array(losses)


def test_overfits_eight_images(monkeypatch):
    """With fixed noise and levels, to 5 % of the first loss."""
    recipe = Recipe(300, 8, OptimizerConfig(learning_rate=3e-3), caption_dropout=0.0)
    task = make_task(recipe)
    draw = task._draw
    monkeypatch.setattr(task, "_draw", lambda key, batch: draw(jax.random.key(1), batch))
    _, losses = run(task, 300, make_batch(), Frozen(None))
    assert losses[-1] <= 0.05 * losses[0], losses[[0, -1]]


MESHES = [
    dict(replica=2, fsdp=2, tensor=2),
    dict(fsdp=2, sequence=2, tensor=2),
]
FEWER_AXES = [
    dict(replica=2),
    dict(replica=2, fsdp=2),
    dict(fsdp=1, tensor=4),
    dict(replica=1, fsdp=8),
    dict(sequence=4),
]
MESHES += [pytest.param(axes, marks=pytest.mark.slow) for axes in FEWER_AXES]


@pytest.fixture(scope="module")
def alone():
    """Compares the first ten losses with those on one device; both networks train."""
    return run(make_task(Recipe(10, 8, ADAMW)), 10, make_batch(), Frozen(None))[1]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_losses_are_the_same_on_every_mesh(alone, axes):
    count = int(np.prod(list(axes.values())))
    mesh = sharding.make_mesh(**{"replica": 1, **axes}, devices=jax.devices()[:count])
    state, losses = run(make_task(Recipe(10, 8, ADAMW)), 10, make_batch(), Frozen(None), mesh)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    used = {n for x in jax.tree.leaves(state) for axis in x.sharding.spec if axis for n in [axis]}
    assert used >= {name for name in ("fsdp", "tensor") if axes.get(name, 1) > 1}


def test_microbatches_equal_the_batch(alone):
    _, losses = run(make_task(Recipe(10, 8, ADAMW, microbatches=4)), 10, make_batch(), Frozen(None))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


SLOW_REMAT = [pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "offload")]


@pytest.mark.parametrize("remat", ["full", *SLOW_REMAT])
def test_remat_changes_no_loss(alone, remat):
    _, losses = run(make_task(Recipe(10, 8, ADAMW), remat=remat), 3, make_batch(), Frozen(None))
    np.testing.assert_allclose(losses, alone[:3], rtol=1e-5)


def test_remat_keeps_what_its_name_says():
    """Looks in the program of a step for its number of products, and for offloaded values."""
    products, host = {}, {}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for remat in REMAT:
        task = make_task(Recipe(10, 8, ADAMW), remat=remat)
        with jax.set_mesh(mesh):
            state, _ = on_mesh(lambda task=task: task.init(jax.random.key(0)), mesh)
            program = str(jax.make_jaxpr(task.step)(state, make_batch(), Frozen(None)))
        products[remat] = program.count("dot_general[")
        host[remat] = f"f32<host>[{DIT.depth},8,16,{DIT.width}]" in program
    assert products["none"] < products["dots"] < products["full"] == products["offload"]
    assert [remat for remat in REMAT if host[remat]] == ["offload"]


FOLLOWS = Recipe(10, 8, ADAMW, int8=("forward",), follow_start=True)


def test_the_start_is_followed_but_for_what_int8_takes():
    """At its start, a network is as far from itself as rounding takes it, and far from the data."""
    task = make_task(FOLLOWS, train=False)
    start, params = start_of(task).params["dit"], encoder_params()
    frozen = Frozen(None, params, *jax.jit(task.read_constants)(params), dit=start)
    assert task.below == DIT and task.passes == 4
    state, (loss,) = run(task, 1, make_batch(), frozen)
    assert 1e-9 < loss < 1e-4
    assert int(state.skipped) == 0


def test_a_text_encoder_that_trains_leaves_no_start_to_follow():
    with pytest.raises(UserError, match="follow_start: the start has read other text"):
        make_task(FOLLOWS)


@pytest.mark.parametrize("int8", [(), ("rows", "weights")])
def test_a_start_that_is_there_already_is_nothing_to_follow(int8):
    with pytest.raises(UserError, match="follow_start: without 'forward' in int8"):
        Recipe(10, 8, ADAMW, int8=int8, follow_start=True)


def test_the_average_follows_the_new_parameters():
    task = make_task(Recipe(10, 8, dataclasses.replace(ADAMW, learning_rate=0.1), ema_decay=0.75))
    first, second = (run(task, steps, make_batch(), Frozen(None))[0] for steps in (3, 4))
    weight = 1 - min(0.75, (1 + 3) / (10 + 3))
    expected = jax.tree.map(lambda a, p: a + weight * (p - a), first.ema, second.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), second.ema, expected)


@pytest.mark.slow
def test_unrolled_blocks_change_no_loss():
    """The transformer has a loop of two blocks and one left; the text encoder has fewer."""
    network = dataclasses.replace(DIT, depth=3)
    tasks = [make_task(Recipe(10, 8, ADAMW), unroll=unroll, network=network) for unroll in (1, 2)]
    losses = [run(task, 3, make_batch(), Frozen(None))[1] for task in tasks]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("keep_mask", [False, True])
def test_loss_by_hand_with_a_frozen_encoder_and_an_instruction(keep_mask):
    """Computes a step's loss anew from the numbers that the step draws."""
    told = "describe the picture: "
    recipe = Recipe(5, 8, ADAMW, NoiseConfig(shift=2.0), caption_dropout=0.5, keep_mask=keep_mask)
    task, batch = make_task(recipe, train=False, instruction=told), make_batch(told)
    params = encoder_params()
    frozen = Frozen(None, params, *jax.jit(task.read_constants)(params))
    state, (loss,) = run(task, 1, batch, frozen)
    assert state.params.keys() == {"dit"}

    start = start_of(task)
    drawn = task._draw(start.step_key(), batch)
    dropped, sigma = np.asarray(drawn["dropped"]), np.asarray(drawn["sigma"])
    assert 0 < dropped.sum() < 8
    whole = tokenize(TOKENIZER, CAPTIONS, ROWS, told)
    sequences = [[*whole.prefix, *row] for row in whole.tokens]
    read = jax.jit(task.text_encoder.apply)
    rows = read({"params": params}, np.array(sequences))
    window = np.where(np.arange(ROWS) == 0, 0, whole.window + len(whole.prefix))
    rows = np.where(whole.mask[..., None], rows[:, window], 0)
    empty = tokenize(TOKENIZER, [""], ROWS, None)
    null = read({"params": params}, empty.tokens)[0, empty.window]
    null = np.where(empty.mask[0][:, None], null, 0)
    mask = np.where(dropped[:, None], empty.mask, whole.mask)
    if keep_mask:  # with the rows of padding, which see the empty prompt alone
        padded = np.zeros((1, ROWS), np.int32)
        padded[0, : empty.tokens.shape[1]] = empty.tokens
        visible = np.arange(ROWS)[None] < empty.mask.sum()
        null, mask = read({"params": params}, padded, None, visible)[0], whole.mask
        assert np.abs(null[ROWS - 1]).max() > 0.1
    rows = np.where(dropped[:, None, None], null, rows)
    data, noise = batch["latents"], np.asarray(drawn["noise"])
    s = sigma[:, None, None, None]
    velocity = jax.jit(task.dit.apply)(
        {"params": start.params["dit"]}, (1 - s) * data + s * noise, 1000 * sigma, rows, mask
    )
    expected = np.mean((np.asarray(velocity, np.float64) - (noise - data)) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_stored_embeddings_train_as_their_captions():
    """Some captions are dropped; the encoder is frozen."""
    recipe = Recipe(3, 8, ADAMW, caption_dropout=0.5)
    task, batch = make_task(recipe, train=False), make_batch()
    params = encoder_params()
    frozen = Frozen(None, params, *jax.jit(task.read_constants)(params))
    _, read = run(task, 3, batch, frozen)
    embeddings = jax.jit(task._encode)(params, (batch["tokens"], batch["mask"]))
    batch = {"latents": batch["latents"], "embeddings": embeddings, "mask": batch["mask"]}
    _, stored = run(task, 3, batch, frozen)
    np.testing.assert_allclose(stored, read, rtol=1e-5)
    _, others = run(task, 3, batch | {"embeddings": embeddings[::-1]}, frozen)
    assert abs(others[0] / read[0] - 1) > 1e-4


def test_a_row_s_draws_do_not_depend_on_the_batch():
    task, batch = make_task(Recipe(5, 8, ADAMW)), make_batch()
    whole = task._draw(jax.random.key(1), batch)
    half = task._draw(jax.random.key(1), jax.tree.map(lambda x: x[:4], batch))
    for name, rows in half.items():
        np.testing.assert_array_equal(rows, whole[name][:4])


def test_error_at_a_level_drops_nothing_and_repeats():
    task, batch = make_task(Recipe(5, 8, ADAMW, caption_dropout=1.0, microbatches=2)), make_batch()
    params, at, errors_of = start_of(task).params, jax.jit(task.error_at), jax.jit(task._errors)
    key = jax.random.key(2)
    first, again = (float(at(params, batch, Frozen(None), 0.5, key)) for _ in range(2))
    assert first == again
    other = dict(batch, tokens=np.roll(batch["tokens"], 1, 0), mask=np.roll(batch["mask"], 1, 0))
    assert float(at(params, other, Frozen(None), 0.5, key)) != first
    for sigma in (0.5, 0.9):
        levels = np.full(8, sigma, np.float32)
        fixed = {"sigma": levels, "timestep": 1000 * levels, "dropped": np.zeros(8, bool)}
        errors = errors_of(params, {**batch, **task._draw(key, batch), **fixed}, Frozen(None))
        expected = np.mean(np.asarray(errors, np.float64))
        np.testing.assert_allclose(at(params, batch, Frozen(None), sigma, key), expected, rtol=1e-5)


def test_a_batch_with_nan_changes_nothing():
    task, batch = make_task(Recipe(10, 8, ADAMW)), make_batch()
    batch["latents"][3, 0, 0, 0] = np.nan
    state, _ = run(task, 2, batch, Frozen(None))
    start = start_of(task)
    assert int(state.skipped) == int(state.streak) == int(state.step) == 2
    for name in "params", "opt_state", "ema":
        ours, before = (jax.tree.leaves(getattr(s, name)) for s in (state, start))
        for x, y in zip(ours, before, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_an_encoder_that_trains_reads_no_instruction():
    with pytest.raises(UserError, match="reads no instruction"):
        make_task(Recipe(5, 8, ADAMW), train=True, instruction="describe: ")


def test_a_network_without_an_update_is_itself():
    """With an alpha too, which says nothing where no rank is given."""
    task = make_task(Recipe(4, 8, ADAMW), train=False)
    task = TextToImageTask(
        *(task.recipe, task.dit, None, task.text_encoder, task.captions),
        lora=LoraConfig(alpha=8.0),
    )
    frozen = Frozen(None, text_encoder={"kernel": np.ones((2, 2))})
    assert task.network("text_encoder", {"dit": {}}, frozen) is frozen.text_encoder


def test_weighting_by_level():
    """The loss is that of flow_matching: the weighted mean of the rows' errors."""
    recipe = Recipe(5, 8, ADAMW, NoiseConfig(weighting="cosmap"))
    task, batch = make_task(recipe), make_batch()
    _, (weighted,) = run(task, 1, batch, Frozen(None))
    start = start_of(task)
    drawn = task._draw(start.step_key(), batch)
    errors = jax.jit(task._errors)(start.params, {**batch, **drawn}, Frozen(None))
    weights = flow_matching.WEIGHTINGS["cosmap"](drawn["sigma"])
    np.testing.assert_allclose(weighted, jnp.mean(weights * errors), rtol=1e-5)


def test_the_objective_of_ddpm_is_the_error_of_the_noise_at_its_own_levels():
    """Whatever config.recipe.noise says; the network's own prediction is the noise."""
    network = dataclasses.replace(DIT, objective="ddpm")
    task = make_task(Recipe(5, 8, ADAMW, NoiseConfig(shift=2.0)), network=network)
    batch = make_batch()
    _, losses = run(task, 5, batch, Frozen(None))
    start = start_of(task)
    drawn = task._draw(start.step_key(), batch)
    sigma, noise = np.asarray(drawn["sigma"]), np.asarray(drawn["noise"])
    assert np.isin(sigma, ddpm.SIGMAS.astype(np.float32)).all()
    embeddings, mask = jax.jit(task._text)(start.params, batch | drawn, Frozen(None))
    timestep = np.searchsorted(ddpm.SIGMAS.astype(np.float32), sigma)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timestep][:, None, None, None]
    state = np.sqrt(kept) * batch["latents"] + np.sqrt(1 - kept) * noise
    predicts = module_for(dataclasses.replace(DIT, objective="flow"), "float32")
    inputs = state.astype(np.float32), timestep.astype(np.float32), embeddings, mask
    found = jax.jit(predicts.apply)({"params": start.params["dit"]}, *inputs)
    np.testing.assert_allclose(losses[0], np.mean((np.asarray(found) - noise) ** 2), rtol=1e-4)
    assert np.isfinite(losses).all()
