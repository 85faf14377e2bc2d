"""Folders of diffusers: every way they are written is read, and what is wrong is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline as TheirPipeline
from flax import traverse_util
from safetensors.torch import load_file, save_file

from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.find import checkpoint_hash
from sana_jax.checkpoints.load import load, open_checkpoint
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from sana_jax.text import instruction
from tests import toy


@pytest.fixture(scope="module")
def theirs():
    return toy.pipeline(qk_norm="rms_norm_across_heads")


@pytest.fixture(scope="module")
def written(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "checkpoint")


def load_on_one_device(folder, dtype="float32", **kwargs):
    return load(str(folder), dtype, make_mesh(devices=toy.devices(1)), **kwargs)


def flat(checkpoint) -> dict:
    leaves = traverse_util.flatten_dict(checkpoint.params, sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_single_files(theirs, written):
    checkpoint = load_on_one_device(written)
    for name, module in (
        ("dit", theirs.transformer),
        ("vae", theirs.vae),
        ("text_encoder", theirs.text_encoder),
    ):
        expected = toy.params(module, getattr(checkpoint, name))
        jax.tree.map(np.testing.assert_array_equal, checkpoint.params[name], expected)
    assert checkpoint.flow_shift == 3.0 and checkpoint.text_rows == 300
    assert checkpoint.vae.scaling_factor == 0.41407


def test_shards(theirs, written, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("transformer/*-of-*.safetensors"))) > 2
    assert_same(load_on_one_device(tmp_path), load_on_one_device(written))


def test_variants(theirs, written, folder):
    """Beside full-precision files, in one file or in shards with an index of their own."""
    half = toy.pipeline(seed=1, qk_norm="rms_norm_across_heads")
    for name in ("transformer", "vae", "text_encoder"):
        getattr(half, name).to(torch.bfloat16)
    half.save_pretrained(folder, variant="bf16")
    half.save_pretrained(folder, variant="fp16", max_shard_size="100KB")
    assert_same(load_on_one_device(folder), load_on_one_device(written))
    whole, shards = (load_on_one_device(folder, variant=v) for v in ("bf16", "fp16"))
    assert_same(whole, shards)
    kernel = "dit/patch_embed/kernel"
    assert (flat(whole)[kernel] != flat(load_on_one_device(written))[kernel]).any()
    with pytest.raises(UserError, match="no files of variant 'int8'"):
        load_on_one_device(folder, variant="int8")


def test_only_a_variant(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(UserError, match="has no .* there are files of variant fp16"):
        load_on_one_device(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(written, folder, stored, dtype):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.to(stored) for n, t in load_file(path).items()}, path)
    found = load_on_one_device(folder, dtype).params["dit"]["proj_out"]["kernel"]
    exact = load_file(path)["proj_out.weight"].float().numpy().T
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), exact.astype(jnp.dtype(dtype)))


def edit_json(path, **changes):
    contents = json.loads(path.read_text())
    contents.update({k: v for k, v in changes.items() if v is not ...})
    for key in [k for k, v in changes.items() if v is ...]:
        contents.pop(key, None)
    path.write_text(json.dumps(contents))


def test_spellings_of_transformers_4(written, folder):
    """rope_theta at the top level, no layer types, the prefix of a whole language model."""
    config = folder / "text_encoder" / "config.json"
    edit_json(config, rope_theta=10000.0, rope_parameters=..., layer_types=..., dtype=...)
    edit_json(config, torch_dtype="float32", cache_implementation="hybrid")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, path)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="GemmaTokenizerFast")
    found = load_on_one_device(folder)
    assert_same(found, load_on_one_device(written))
    assert found.text_encoder == load_on_one_device(written).text_encoder
    assert found.tokenizer.encode("a cat") == load_on_one_device(written).tokenizer.encode("a cat")


def test_older_transformer_config(written, folder):
    config = folder / "transformer" / "config.json"
    edit_json(config, guidance_embeds=..., guidance_embeds_scale=..., timestep_scale=...)
    assert load_on_one_device(folder).dit == load_on_one_device(written).dit


@pytest.mark.parametrize(
    "scheduler, shift",
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=6.0), 6.0),
        (dict(flow_shift=4.0, lambda_min_clipped=float("-inf")), 4.0),
    ],
)
def test_schedulers(folder, caplog, scheduler, shift):
    edit_json(folder / "scheduler" / "scheduler_config.json", **scheduler)
    assert load_on_one_device(folder).flow_shift == shift
    assert ("sampler=flow_euler" in caplog.text) == ("_class_name" in scheduler)


def test_batch_norm_counters_are_not_read(theirs, folder):
    vae = toy.autoencoder(decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3)
    vae.save_pretrained(folder / "vae")
    names = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert any(name.endswith("num_batches_tracked") for name in names)
    checkpoint = load_on_one_device(folder)
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.params["vae"], toy.params(vae, checkpoint.vae)
    )


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def spoil(folder, change):
    """Rewrites the transformer's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rename(tensors):
    tensors["proj.weight"] = tensors.pop("proj_out.weight")


def transpose(tensors):
    tensors["caption_projection.linear_1.weight"] = tensors[
        "caption_projection.linear_1.weight"
    ].T.contiguous()


def poison(value):
    def change(tensors):
        tensors["transformer_blocks.1.ff.conv_depth.weight"][3, 0, 1, 1] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (rename, ["missing proj_out.weight", "unexpected proj.weight"]),
        (transpose, ["caption_projection.linear_1.weight is [48, 64] instead of [64, 48]"]),
        (lambda t: t.update({"proj_out.bias": t["proj_out.bias"].int()}), ["proj_out.bias is I32"]),
        (lambda t: t.clear(), ["missing", "in all)"]),
        (poison(float("nan")), ["conv_depth.weight", "NaN"]),
        (poison(float("inf")), ["conv_depth.weight", "Inf"]),
    ],
)
def test_wrong_tensors_are_named(folder, change, words):
    spoil(folder, change)
    with pytest.raises(UserError) as error:
        load_on_one_device(folder)
    for word in [*words, "transformer"]:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_values_beyond_float16_are_named(folder):
    spoil(folder, poison(1e6))
    load_on_one_device(folder, "bfloat16")
    with pytest.raises(UserError, match="conv_depth.weight overflows float16"):
        load_on_one_device(folder, "float16")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "change, words",
    [
        (truncate, "not a whole safetensors file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_text("<html><body>404</body></html>"), "a web page"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-LFS pointer"),
        (lambda p: p.unlink(), "has no diffusion_pytorch_model.safetensors"),
        (lambda p: p.rename(p.with_suffix(".bin")), "pickled .bin"),
    ],
)
def test_damaged_files_are_named(folder, change, words):
    change(folder / WEIGHTS)
    with pytest.raises(UserError, match="transformer.*" + words):
        load_on_one_device(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda i: i.unlink(), "has no diffusion_pytorch_model"),
        (lambda i: i.write_text("{}"), "not an index"),
        (lambda i: i.write_text("not json"), "not an index"),
        (lambda i: next(i.parent.glob("*-of-*")).unlink(), "is missing"),
        (lambda i: i.write_text(i.read_text().replace('": "', '": "../')), "outside its folder"),
        (lambda i: i.write_text(i.read_text().replace('": "', '": "/')), "outside its folder"),
        (
            lambda i: i.write_text(i.read_text().replace('"scale_shift_table"', '"no_such"')),
            "lacks no_such",
        ),
    ],
)
def test_damaged_indices_are_named(theirs, folder, change, words):
    (folder / WEIGHTS).unlink()
    theirs.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    change(folder / f"{WEIGHTS}.index.json")
    with pytest.raises(UserError, match=words):
        load_on_one_device(folder)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("model_index.json", dict(_class_name="SanaSprintPipeline"), "Sana Sprint"),
        ("model_index.json", dict(_class_name="SanaControlNetPipeline"), "Sana ControlNet"),
        ("model_index.json", dict(_class_name="SanaPAGPipeline"), "Sana PAG"),
        ("model_index.json", dict(_class_name="SanaVideoPipeline"), "Sana Video"),
        ("model_index.json", dict(_class_name="FluxPipeline"), "FluxPipeline"),
        ("transformer/config.json", dict(guidance_embeds=True), "Sprint"),
        ("transformer/config.json", dict(num_layers=4), "missing transformer_blocks.3"),
        ("transformer/config.json", dict(num_layers="3"), "transformer/config.json.*depth '3'"),
        ("vae/config.json", dict(encoder_block_types="OtherBlock"), "OtherBlock"),
        ("text_encoder/config.json", dict(model_type="t5"), "t5"),
        ("scheduler/scheduler_config.json", dict(_class_name="SCMScheduler"), "SCMScheduler"),
        ("scheduler/scheduler_config.json", dict(prediction_type="epsilon"), "epsilon"),
        ("scheduler/scheduler_config.json", dict(algorithm_type="sde-dpmsolver++"), "sde-"),
        ("scheduler/scheduler_config.json", dict(solver_order=3), "solver_order 3"),
        ("scheduler/scheduler_config.json", dict(use_dynamic_shifting=True), "dynamic_shifting"),
        ("scheduler/scheduler_config.json", dict(use_flow_sigmas=...), "use_flow_sigmas False"),
        ("scheduler/scheduler_config.json", dict(use_karras_sigmas=True), "use_karras_sigmas True"),
        ("scheduler/scheduler_config.json", dict(use_lu_lambdas=True), "use_lu_lambdas True"),
        ("scheduler/scheduler_config.json", dict(flow_shift=None), "flow_shift None"),
        ("scheduler/scheduler_config.json", dict(flow_shift="3"), "flow_shift '3'"),
        ("scheduler/scheduler_config.json", dict(flow_shift=-1), "flow_shift -1"),
        ("transformer/config.json", dict(_class_name="SanaControlNetModel"), "ControlNetModel"),
        ("transformer/config.json", dict(mlp_ratio="2.5"), "mlp_ratio '2.5'"),
        ("transformer/config.json", dict(mlp_ratio=0.0), "mlp_ratio 0.0"),
        ("transformer/config.json", dict(interpolation_scale="1"), "interpolation_scale '1'"),
        ("transformer/config.json", dict(interpolation_scale=0), "interpolation_scale 0"),
        ("transformer/config.json", dict(timestep_scale=None), "timestep_scale None"),
        ("transformer/config.json", dict(attention_head_dim=0), "0"),
        ("vae/config.json", dict(_class_name="AutoencoderKL"), "AutoencoderKL"),
        ("vae/config.json", dict(downsample_block_type=None), "downsample"),
        ("vae/config.json", dict(attention_head_dim=0), "attention_head_dim 0"),
        ("vae/config.json", dict(latent_channels=0), "latent_channels 0"),
        ("vae/config.json", dict(encoder_block_out_channels=[]), "encoder_channels"),
        ("vae/config.json", dict(encoder_block_out_channels=[0] * 6), "encoder_channels"),
        ("vae/config.json", dict(encoder_qkv_multiscales=[5] * 6), "encoder_qkv_multiscales"),
        ("vae/config.json", dict(encoder_layers_per_block=["1"] * 6), "encoder_layers"),
        ("vae/config.json", dict(encoder_layers_per_block=[-1] * 6), "encoder_layers"),
        ("vae/config.json", dict(scaling_factor=None), "scaling_factor None"),
        ("vae/config.json", dict(scaling_factor=0), "scaling_factor 0"),
        ("text_encoder/config.json", dict(num_key_value_heads=0), "num_kv_heads 0"),
        ("text_encoder/config.json", dict(sliding_window="4"), "sliding_window '4'"),
        ("text_encoder/config.json", dict(rms_norm_eps="1e-6"), "rms_norm_eps '1e-6'"),
        ("text_encoder/config.json", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar 0"),
        ("text_encoder/config.json", dict(attn_logit_softcapping=0), "attn_logit_softcap 0"),
        ("text_encoder/config.json", dict(rope_parameters=dict(rope_theta=None)), "rope_theta"),
    ],
)
def test_other_kinds_are_refused_by_name(folder, file, changes, words):
    edit_json(folder / file, **changes)
    with pytest.raises(UserError, match=words):
        load_on_one_device(folder)


def test_missing_and_broken_configs(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing"):
        load_on_one_device(folder)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match="vae/config.json is not JSON"):
        load_on_one_device(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae/config.json is missing"):
        load_on_one_device(folder)


def test_an_autoencoder_alone(written, tmp_path):
    """As DC-AE is published: config and weights, no pipeline around them."""
    alone, whole = load_on_one_device(written / "vae"), load_on_one_device(written)
    assert alone.configs() == {"vae": whole.vae}
    assert_same(alone, dataclasses.replace(whole, params={"vae": whole.params["vae"]}))
    copy = shutil.copytree(written / "vae", tmp_path / "vae")
    assert checkpoint_hash(copy) == checkpoint_hash(written / "vae")
    edit_json(copy / "config.json", scaling_factor=2.0)
    assert checkpoint_hash(copy) != checkpoint_hash(written / "vae")
    with pytest.raises(UserError, match="SanaTransformer2DModel checkpoint; only SanaPipeline"):
        load_on_one_device(written / "transformer")


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="native folder, a diffusers folder, a bundled name"):
        load_on_one_device("no_such_model")
    with pytest.raises(UserError, match="neither model.json"):
        load_on_one_device(tmp_path)
    with pytest.raises(UserError, match="some/model is no folder here"):
        load_on_one_device("some/model")  # tests are offline


def test_native_round_trip(written, tmp_path):
    """diffusers -> native -> diffusers: the same weights to the bit, and diffusers loads them."""
    first = load_on_one_device(written)
    native.save(first, tmp_path / "native", max_shard_bytes=100_000)
    assert (tmp_path / "native" / "dit.safetensors.index.json").is_file()
    second = load_on_one_device(tmp_path / "native")
    assert_same(second, first)
    for name in ("dit", "vae", "text_encoder", "flow_shift", "text_rows", "instruction"):
        assert getattr(second, name) == getattr(first, name), name
    diffusers.save(second, tmp_path / "diffusers", max_shard_bytes=100_000)
    assert_same(load_on_one_device(tmp_path / "diffusers"), first)
    their = TheirPipeline.from_pretrained(tmp_path / "diffusers")
    again = toy.params(their.transformer, first.dit)
    jax.tree.map(np.testing.assert_array_equal, again, first.params["dit"])


def test_damaged_native_folder(written, tmp_path):
    native.save(load_on_one_device(written), tmp_path / "native")
    weights = tmp_path / "native" / "dit.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="dit.safetensors is damaged"):
        load_on_one_device(tmp_path / "native")
    native.save(load_on_one_device(written), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "dit.safetensors", weights)
    load_on_one_device(tmp_path / "native")
    shutil.copy(weights, tmp_path / "native" / "extra.safetensors")
    with pytest.raises(UserError, match="extra.safetensors is not in model.json"):
        load_on_one_device(tmp_path / "native")
    (tmp_path / "native" / "extra.safetensors").unlink()
    edit_json(tmp_path / "native" / "model.json", version=2)
    with pytest.raises(UserError, match="version 2"):
        load_on_one_device(tmp_path / "native")


@pytest.mark.parametrize(
    "changes",
    [
        dict(files=None),
        dict(files=["a"]),
        dict(files={}),
        dict(files={"../outside": "0"}),
        dict(sampler=...),
        dict(sampler=dict(flow_shift="3", text_rows=300)),
        dict(sampler=dict(flow_shift=3.0, text_rows=0)),
        dict(instruction=dict(text=5, source="x", sha256="y")),
        dict(instruction=dict(text="a", source="x", sha256="y")),
        dict(dit=dict(depth="2")),
        dict(dit=dict(no_such_field=2)),
        dict(format="other"),
    ],
)
def test_broken_model_json(written, tmp_path, changes):
    native.save(load_on_one_device(written), tmp_path / "native")
    edit_json(tmp_path / "native" / "model.json", **changes)
    with pytest.raises(UserError, match="model.json"):
        load_on_one_device(tmp_path / "native")


def test_instruction_of_a_diffusers_folder(written, tmp_path, monkeypatch, caplog):
    """From the file given, else from the installed diffusers; without either one line says so."""
    assert load_on_one_device(written).instruction.source.startswith("diffusers/")
    file = tmp_path / "instruction.txt"
    file.write_text("draw: ")
    assert load_on_one_device(written, instruction_file=str(file)).instruction.text == "draw: "
    monkeypatch.setattr(instruction, "_diffusers_instruction", lambda: None)
    with caplog.at_level("WARNING"):
        assert load_on_one_device(written).instruction is None
    (line,) = [r.getMessage() for r in caplog.records if "instruction" in r.getMessage()]
    assert "--instruction_file" in line and "\n" not in line


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("Sana_600M_1024px_diffusers", {}, True),
        ("Sana_600M_1024px_diffusers", {"dtype": "float16"}, False),
        ("models--org--Sana_1600M_512px_MultiLing_diffusers/snapshots/0123abc", {}, True),
        ("Sana_600M_1024px_diffusers", {"clip_attention": True}, False),
        ("Sana_1600M_1024px_BF16_diffusers", {}, False),
        ("SANA1.5_1.6B_1024px_diffusers", {}, False),
    ],
)
def test_weights_trained_in_float16_are_told_of(written, tmp_path, caplog, name, options, told):
    """Of a folder that was converted too, which has another name."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(written)
    found = load_on_one_device(tmp_path / name, **options)
    assert ("was trained in float16" in caplog.text) == told
    caplog.clear()
    native.save(found, tmp_path / "native")
    load_on_one_device(tmp_path / "native", options.get("dtype", "float32"))
    assert ("was trained in float16" in caplog.text) == told


def test_where_a_checkpoint_is_from(written, tmp_path):
    folder = tmp_path / "models--org--name-diffusers" / "snapshots" / "0123abc"
    shutil.copytree(written, folder)
    for weights in folder.glob("transformer/*.safetensors"):
        weights.rename(weights.with_suffix(".bf16.safetensors"))
    assert open_checkpoint(str(folder), "bf16").provenance == {
        "source": "org/name-diffusers",
        "commit": "0123abc",
        "layout": "diffusers",
        "variant": "bf16",
    }
