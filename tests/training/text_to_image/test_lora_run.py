"""A training of a LoRA, from its config to its file."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from sana_jax.checkpoints import native
from sana_jax.checkpoints.quantised import quantise
from sana_jax.lora.adapter import by_network
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime.errors import UserError
from sana_jax.text.instruction import Instruction
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.text_to_image.networks import open_start
from sana_jax.training.text_to_image.result import open_workdir
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.toy import load

LORA = dict(lora__rank=4, lora__alpha=8.0, recipe__ema_decay=0.5)


def changes(config, **more):
    base = dict(start=str(config.parent / "base"), network__head_dim=32, network__sample_size=16)
    return LORA | base | more


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    hooks = dict(loop__images_every=20, loop__evaluate_every=20, data__size=16)
    TextToImageTraining(load(config, **changes(config, **hooks)), str(workdir)).run()
    return workdir


def test_only_the_lora_trains(unbroken):
    document, params = read_newest(unbroken, "params")
    assert list(params) == ["lora"]
    assert set(params["lora"]["blocks"]) == {"attention", "cross_attention"}
    for site in params["lora"]["blocks"]["attention"].values():
        assert site["a"].shape == (1, 32, 4) and np.abs(site["b"]).max() > 0
    state = [name for name in document["leaves"] if name.startswith("opt_state/")]
    assert state and all("/lora/" in name or "/count" in name for name in state)


def test_it_learns(unbroken):
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert any("held_out_loss" in row for row in rows)
    assert (unbroken / "images/samples_00000020.png").is_file()


def test_the_file_says_what_it_is_of(unbroken, config):
    (file,) = (unbroken / "model").iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert weights[name].shape == (4, 32)
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    made = json.loads(metadata["sana_jax"])
    assert made["steps"] == 20 and made["start"] == "base"


def test_the_pictures_of_the_run_are_those_of_its_file(unbroken, config, tmp_path):
    pipe = SanaPipeline.from_pretrained(str(config.parent / "base"), dtype="float32")
    before = pipe("a red cat", height=16, width=16, num_steps=1, output="float")
    pipe.load_lora(str(unbroken / "model"))
    after = pipe("a red cat", height=16, width=16, num_steps=1, output="float")
    native.save(open_workdir(unbroken), tmp_path / "merged")
    merged = SanaPipeline.from_pretrained(str(tmp_path / "merged"), dtype="float32")
    theirs = merged("a red cat", height=16, width=16, num_steps=1, output="float")
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-3
    np.testing.assert_allclose(after, theirs, atol=1e-4)


def test_it_resumes_to_the_bit(unbroken, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for step in 15, 20:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "model")
    hooks = dict(loop__images_every=20, loop__evaluate_every=20, data__size=16)
    TextToImageTraining(load(config, **changes(config, **hooks)), str(workdir)).run()
    ours, theirs = (read_newest(folder, "ema")[0]["leaves"] for folder in (workdir, unbroken))
    assert ours == theirs
    ours, theirs = (load_file(next((run / "model").iterdir())) for run in (workdir, unbroken))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_one_of_both_networks_trains(config, tmp_path):
    """With an instruction, whose keys and values change with every step."""
    base = native.open_folder(config.parent / "base")
    base.instruction = Instruction("describe: ", "a test")
    native.save(base, tmp_path / "told")
    targets = ("blocks/cross_attention/.*", "text_encoder/layers/[qv]")
    given = dict(lora__targets=targets, loop__images_every=20, loop__evaluate_every=20)
    given |= dict(data__size=16, text_encoder__checkpoint=str(tmp_path / "told"))
    workdir = tmp_path / "run"
    run = TextToImageTraining(load(config, **changes(config, **given)), str(workdir))
    assert run.captions.prefix and run.task.text_encoder.trains
    run.run()
    _, params = read_newest(workdir, "params")
    for network in by_network(params["lora"]).values():
        updates = [x for name, x in flatten_dict(network, sep="/").items() if name.endswith("/b")]
        assert updates and all(np.abs(update).max() > 0 for update in updates)
    drawn = []
    for kind in "file", "merged":
        if kind == "file":
            pipe = SanaPipeline.from_pretrained(str(tmp_path / "told"), dtype="float32")
            pipe.load_lora(str(workdir / "model"))
        else:
            native.save(open_workdir(workdir), tmp_path / kind)
            pipe = SanaPipeline.from_pretrained(str(tmp_path / kind), dtype="float32")
        drawn.append(pipe("a red cat", height=16, width=16, num_steps=1, output="float"))
    np.testing.assert_allclose(*drawn, atol=1e-4)


def test_dropout_is_of_the_step_alone(config, tmp_path):
    """Whether the batch is computed at once or in parts, and again after a resume."""
    given = changes(config, lora__dropout=0.5, data__size=16)
    run = TextToImageTraining(load(config, **given), str(tmp_path / "a"))
    batch = run.loader.batch(0)
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.task.init)(jax.random.key(0))
        rows = run.task._draw(state.step_key(), batch)
        again = run.task._draw(state.step_key(), batch)
    assert (rows["lora_key"] == again["lora_key"]).all()
    assert len(np.unique(np.asarray(rows["lora_key"]), axis=0)) == 8


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(start=None), "config.start is missing"),
        (dict(network__head_dim=16), "config.network.head_dim=16, but 32 of"),
        (dict(network__qk_norm=True), "config.network.qk_norm=True, but False of"),
        (dict(lora__rank=33), "config.lora: rank=33"),
        (dict(lora__rank=-1), "config.lora.rank -1"),
        (dict(lora__targets=("nothing",)), "config.lora: targets: 'nothing' matches nothing"),
        (dict(lora__alpha=-1.0), "config.lora.alpha=-1.0"),
        (dict(text_encoder__train=True), "config.text_encoder"),
    ],
)
def test_what_cannot_train_is_refused(config, tmp_path, more, told):
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        TextToImageTraining(load(config, **changes(config, **more)), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_base_is_not_gone_on_with(unbroken, config, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(config.parent / "base", other)
    model = json.loads((other / "model.json").read_text())
    model["provenance"]["changed"] = True
    (other / "model.json").write_text(json.dumps(model))
    native.open_folder(other)
    shutil.copytree(unbroken, tmp_path / "run")
    given = changes(config, start=str(other), recipe__steps=40, data__size=16)
    with pytest.raises(UserError, match="start"):
        TextToImageTraining(load(config, **given), str(tmp_path / "run")).run()


@pytest.mark.slow  # tests/lora/test_adapter.py has its gradients
def test_it_trains_beside_int8_weights(config, tmp_path):
    base, made = tmp_path / "int8", quantise(native.open_folder(config.parent / "base"), "w8a8")
    base.mkdir()
    native.save(made, base)
    int8 = dict(start=str(base), network__quantised=made.dit.quantised, data__size=16)
    training = TextToImageTraining(load(config, **changes(config, **int8)), str(tmp_path / "run"))
    training.run()
    kernel = training._frozen.dit["blocks"]["attention"]["qkv"]["kernel"]
    assert (kernel.values.dtype, kernel.rows) == ("int8", "int8")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]

    pipe = SanaPipeline.from_pretrained(str(base), dtype="float32")
    draw = dict(height=16, width=16, num_steps=1, output="float")
    before = np.asarray(pipe("a red cat", **draw))
    pipe.load_lora(str(tmp_path / "run/model"))
    assert np.abs(np.asarray(pipe("a red cat", **draw)) - before).max() > 1e-3
    pipe.unload_lora()
    np.testing.assert_array_equal(pipe("a red cat", **draw), before)
    with pytest.raises(UserError, match="is quantised, and a LoRA cannot be merged"):
        open_workdir(tmp_path / "run")
    with pytest.raises(UserError, match="config.network.quantised: int8 weights do not train"):
        TextToImageTraining(load(config, **{**changes(config, **int8), "lora__rank": 0}), "unused")
    with pytest.raises(UserError, match="int8 is int8: name what it was made from"):
        open_start(load(config, start=str(base)))
    made.provenance["quantised"]["smoothing"] = {"prompts": 1}
    native.save(made, smoothed := tmp_path / "smoothed")
    int8 = int8 | dict(start=str(smoothed), lora__targets=("blocks/ffn/.*",))
    with pytest.raises(UserError, match="lora.targets: the rows of blocks/ffn/contract are smoo"):
        TextToImageTraining(load(config, **changes(config, **int8)), "unused")
    int8["lora__targets"] = ("blocks/fnn",)
    with pytest.raises(UserError, match="config.lora: targets: 'blocks/fnn' matches nothing"):
        TextToImageTraining(load(config, **changes(config, **int8)), "unused")
