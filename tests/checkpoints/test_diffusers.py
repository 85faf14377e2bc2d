"""Folders of diffusers: every way they are written is read, and what is wrong is named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from safetensors.torch import load_file, save_file

from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.find import checkpoint_hash
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.checkpoints.folders import assert_same, edit_json, flat, load_on_one_device


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


@pytest.mark.parametrize("kind", ["SanaSprintPipeline", "SanaSprintImg2ImgPipeline"])
def test_sprint_goes_both_ways(tmp_path, kind):
    """Read as diffusers writes it, and written so that diffusers reads it, to the bit."""
    theirs = toy.sprint_pipeline()
    theirs.save_pretrained(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "model_index.json", _class_name=kind)
    found = load_on_one_device(tmp_path / "theirs")
    assert found.dit.guidance_embedding == 0.1 and found.dit.timestep_scale == 0.001
    expected = toy.params(theirs.transformer, found.dit)
    jax.tree.map(np.testing.assert_array_equal, found.params["dit"], expected)
    native.save(found, made(tmp_path / "native"))
    again = load_on_one_device(tmp_path / "native")
    assert_same(again, found)
    assert again.dit == found.dit
    diffusers.save(again, made(tmp_path / "ours"))
    read = SanaSprintPipeline.from_pretrained(tmp_path / "ours")
    assert type(read.scheduler).__name__ == "SCMScheduler"
    assert read.scheduler.config.sigma_data == theirs.scheduler.config.sigma_data
    for name, tensor in theirs.transformer.state_dict().items():
        assert torch.equal(read.transformer.state_dict()[name], tensor), name
    edit_json(
        tmp_path / "ours" / "scheduler" / "scheduler_config.json",
        _class_name="FlowMatchEulerDiscreteScheduler",
        prediction_type=...,
    )
    with pytest.raises(UserError, match="FlowMatchEuler.* for a transformer that embeds the"):
        load_on_one_device(tmp_path / "ours")


def made(folder):
    folder.mkdir()
    return folder


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


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("model_index.json", dict(_class_name="SanaControlNetPipeline"), "Sana ControlNet"),
        ("model_index.json", dict(_class_name="SanaPAGPipeline"), "Sana PAG"),
        ("model_index.json", dict(_class_name="SanaVideoPipeline"), "Sana Video"),
        ("model_index.json", dict(_class_name="FluxPipeline"), "FluxPipeline"),
        ("model_index.json", dict(_class_name="SanaSprintControlNetPipeline"), "ControlNet"),
        ("transformer/config.json", dict(guidance_embeds=True), "missing time_embed.guidance_e"),
        ("transformer/config.json", dict(num_layers=4), "missing transformer_blocks.3"),
        ("transformer/config.json", dict(num_layers="3"), "transformer/config.json.*depth '3'"),
        ("vae/config.json", dict(encoder_block_types="OtherBlock"), "OtherBlock"),
        ("text_encoder/config.json", dict(model_type="t5"), "t5"),
        (
            "scheduler/scheduler_config.json",
            dict(_class_name="SCMScheduler", prediction_type=...),
            "does not embed",
        ),
        (
            "scheduler/scheduler_config.json",
            dict(_class_name="SCMScheduler"),
            "prediction_type 'flow_prediction' is not supported, only 'trigflow'",
        ),
        ("scheduler/scheduler_config.json", dict(prediction_type="epsilon"), "epsilon"),
        ("scheduler/scheduler_config.json", dict(algorithm_type="sde-dpmsolver++"), "sde-"),
        ("scheduler/scheduler_config.json", dict(solver_order=3), "solver_order 3"),
        ("scheduler/scheduler_config.json", dict(use_dynamic_shifting=True), "dynamic_shifting"),
        ("scheduler/scheduler_config.json", dict(use_flow_sigmas=...), "use_flow_sigmas False"),
        ("scheduler/scheduler_config.json", dict(use_karras_sigmas=True), "use_karras_sigmas True"),
        ("scheduler/scheduler_config.json", dict(use_lu_lambdas=True), "use_lu_lambdas True"),
        (
            "scheduler/scheduler_config.json",
            dict(num_train_timesteps=500),
            "num_train_timesteps 500",
        ),
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
        ("scheduler/scheduler_config.json", dict(_class_name=["a"]), "is not supported"),
        ("scheduler/scheduler_config.json", dict(flow_shift=1e300), "flow_shift 1e[+]300"),
        ("transformer/config.json", dict(num_attention_heads="ab"), "num_attention_heads 'ab'"),
        ("transformer/config.json", dict(num_layers=10**9), "depth 1000000000"),
        ("text_encoder/config.json", dict(num_hidden_layers=10**9), "num_layers 1000000000"),
        ("text_encoder/config.json", dict(layer_types=[]), "layer_types names 0 of 3"),
        ("text_encoder/config.json", dict(layer_types=7), "layer_types 7"),
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
    """DC-AE is published like this: config and weights, without a pipeline around them."""
    alone, whole = load_on_one_device(written / "vae"), load_on_one_device(written)
    assert alone.configs() == {"vae": whole.vae}
    assert_same(alone, dataclasses.replace(whole, params={"vae": whole.params["vae"]}))
    copy = shutil.copytree(written / "vae", tmp_path / "vae")
    assert checkpoint_hash(copy) == checkpoint_hash(written / "vae")
    edit_json(copy / "config.json", scaling_factor=2.0)
    assert checkpoint_hash(copy) != checkpoint_hash(written / "vae")
    with pytest.raises(UserError, match=f"is a part of a checkpoint: give the whole, {written}"):
        load_on_one_device(written / "transformer")
    copy = shutil.copytree(written / "transformer", tmp_path / "fine-tune")
    with pytest.raises(UserError, match="fine-tune holds the transformer alone.*convert.*--rest"):
        load_on_one_device(copy)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_name": "dc-ae-f32c32-sana-1.0"}, "give.* mit-han-lab/dc-ae-f32c32-sana-1.0-diff"),
        ({"architectures": ["Gemma2Model"]}, "without a _class_name; only SanaPipeline"),
        ({"_class_name": "UNet2DModel"}, "a UNet2DModel checkpoint; only SanaPipeline"),
    ],
)
def test_other_kinds_are_named_with_the_remedy(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        open_checkpoint(str(tmp_path))


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
