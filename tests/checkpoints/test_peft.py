"""LoRA files, against peft and diffusers in float32."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from diffusers import SanaPipeline
from flax import linen as nn
from flax import traverse_util
from safetensors import safe_open

from sana_jax.checkpoints.components import abstract_params
from sana_jax.checkpoints.diffusers_configs import gemma2_from_transformers
from sana_jax.checkpoints.peft import METADATA, modules, read_adapter, write_adapter
from sana_jax.lora.adapter import attach, by_network, new_adapter, sites, with_text_encoder
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import PRESETS, SanaTransformer
from sana_jax.models.gemma2 import Gemma2
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.models.test_dit import apply, inputs, reference

TIMESTEP = 562
KINDS = {
    "plain": {},
    "of 1.5, with biases": dict(qk_norm="rms_norm_across_heads", attention_bias=True),
    "patches of 2": dict(patch_size=2),
}


@pytest.fixture(params=KINDS)
def theirs(request):
    return toy.transformer(**KINDS[request.param])


def random_adapter(config, targets=(".*",), rank=4, seed=1):
    """An adapter that changes the network, unlike a new one."""
    lora = LoraConfig(rank, targets=targets)
    made = nn.unbox(new_adapter(abstract_params(config), lora, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    # The update is half as large as the weights.
    return jax.tree.map(
        lambda x: 0.7 * rng.standard_normal(x.shape, np.float32) / x.shape[-2] ** 0.5, made
    )


def velocity(config, params):
    latents, caption, mask = inputs(config)
    times = np.array([TIMESTEP], np.float32)
    return apply(SanaTransformer(config), params, latents, times, caption, mask)


def velocity_of(module, config):
    latents, caption, mask = inputs(config)
    return reference(module, latents, TIMESTEP, caption, mask)


def load(module, file, **kwargs):
    """Gives a LoRA file to diffusers, as its pipelines do."""
    state, metadata = SanaPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    SanaPipeline.load_lora_into_transformer(state, module, metadata=metadata, **kwargs)


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_diffusers_computes_what_is_written(theirs, alpha, tmp_path):
    module, config = theirs
    params, adapter = toy.params(module, config), random_adapter(config)
    file = tmp_path / "new" / "pytorch_lora_weights.safetensors"
    write_adapter(file, adapter, config, alpha)
    load(module, file)
    ours = velocity(config, attach(params, [(adapter, 1 if alpha is None else alpha / 4)]))
    toy.assert_close(ours, velocity_of(module, config), 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(ours, velocity(config, params), 1e-2)


def test_a_site_has_an_alpha_by_its_scale(tmp_path):
    module, config = toy.transformer()
    params, adapter = toy.params(module, config), random_adapter(config)
    flat = traverse_util.flatten_dict(adapter, sep="/")
    flat["blocks/attention/q/scale"] = np.array([0.5, 2, 1.25])
    flat["proj_out/scale"] = np.array(3.0)
    adapter = traverse_util.unflatten_dict(flat, sep="/")
    write_adapter(tmp_path / "lora.safetensors", adapter, config)
    load(module, tmp_path / "lora.safetensors")
    ours = velocity(config, attach(params, [(adapter, 1)]))
    toy.assert_close(ours, velocity_of(module, config), 1e-5)


def test_the_header_says_what_a_file_is(tmp_path):
    _, config = toy.transformer()
    file = tmp_path / "lora.safetensors"
    write_adapter(file, random_adapter(config), config, alpha=8, metadata={"steps": 500})
    with safe_open(file, framework="np") as opened:
        header = opened.metadata()
    told = json.loads(header[METADATA])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 8)
    assert told["transformer.rank_pattern"] == told["transformer.alpha_pattern"] == {}
    assert (header["steps"], header["absent_alpha"]) == ("500", "rank")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_site_is_a_module_and_every_module_a_site(preset):
    config, found = PRESETS[preset], {}
    for module in modules(PRESETS[preset]).values():
        found.setdefault(module.site, []).append(module.layer)
    known = sites(abstract_params(config))
    assert found.keys() == known.keys()
    for site, layers in found.items():
        assert layers == ([*range(config.depth)] if site.startswith("blocks/") else [()]), site


@pytest.fixture
def both(config, tmp_path):
    """A LoRA of both networks, its file, and what peft takes for the text encoder."""
    reader = gemma2_from_transformers(toy.text_encoder(64).config.to_dict())
    attention = random_adapter(config, ("blocks/attention/q",))
    adapter = with_text_encoder(attention, random_adapter(reader, rank=3))
    adapter["text_encoder"]["layers"]["q"]["scale"] = np.array([0.5, 2, 1])
    write_adapter(tmp_path / "lora.safetensors", adapter, config, 7, text_encoder=reader)
    return adapter, tmp_path / "lora.safetensors", reader


def test_transformers_computes_what_is_written_for_the_text_encoder(both):
    adapter, file, reader = both
    tokens = np.random.default_rng(0).integers(0, 64, (2, 11))

    def hidden(params):
        return Gemma2(reader).apply({"params": params}, tokens)

    module = toy.text_encoder(64)
    params = toy.params(module, reader)
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()[METADATA])
        state = {key: opened.get_tensor(key) for key in opened.keys()}
    told = {k.removeprefix("text_encoder."): x for k, x in told.items() if k[:5] == "text_"}
    assert told["alpha_pattern"].keys() == {f"layers.{i}.self_attn.q_proj" for i in range(3)}
    wrapped = peft.get_peft_model(module, peft.LoraConfig(**told))  # changes the module itself
    state = {k.replace("text_encoder", "base_model.model"): x for k, x in state.items()}
    state = {k: x for k, x in state.items() if k.startswith("base_model")}
    assert not peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens)).last_hidden_state.numpy()
    found = by_network(read_adapter(file, toy.transformer()[1], reader))["text_encoder"]
    toy.assert_close(hidden(attach(params, [(found, 1)])), theirs, 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(hidden(params), theirs, 1e-2)


def test_diffusers_leaves_the_part_of_the_text_encoder_unread(both):
    adapter, file, _ = both
    module, config = toy.transformer()
    params = toy.params(module, config)
    load(module, file)
    ours = velocity(config, attach(params, [(by_network(adapter)["dit"], 7 / 4)]))
    toy.assert_close(ours, velocity_of(module, config), 1e-5)


def test_a_lora_of_a_text_encoder_is_of_a_checkpoint_that_has_one(both, config):
    with pytest.raises(UserError, match="no matrix of this checkpoint's text encoder"):
        read_adapter(both[1], config)


def test_what_the_layout_has_no_name_for_is_not_written(tmp_path):
    _, config = toy.transformer()
    site = {"a": np.zeros((3, 64, 4)), "b": np.zeros((3, 4, 64))}
    with pytest.raises(UserError, match="blocks/elsewhere"):
        write_adapter(tmp_path / "lora.safetensors", {"blocks": {"elsewhere": site}}, config)
    assert not [*tmp_path.iterdir()]


# peft's side: its own module names, ranks and alphas.
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point", "patch_embed.proj"),
    *("caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    *("timestep_embedder.linear_1", "timestep_embedder.linear_2", "time_embed.linear"),
]
PATTERNS = dict(
    # The first pattern that matches counts, so that the order is part of the meaning.
    rank_pattern={"to_q": 6, r"transformer_blocks\.1\..*": 2, "ff.conv_point": 5, "proj_out": 1},
    alpha_pattern={r"attn2\.to_[qk]": 3, "to_k": 9.5, "conv_inverted": 1, "^proj_out": 2},
)
CONFIGS = {
    "alpha is the rank": dict(r=4, lora_alpha=4),
    "alpha is another": dict(r=4, lora_alpha=7),
    "patterns": dict(r=4, lora_alpha=6, **PATTERNS),
    "rank-stabilised": dict(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"to_v": 2}),
    "some layers": dict(r=3, lora_alpha=6, target_modules=r"transformer_blocks\.[02].*to_[qv]"),
}


def add_adapter(module, name="default", seed=5, **fields):
    """Gives a torch module a random LoRA of peft's."""
    module.add_adapter(peft.LoraConfig(**{"target_modules": TARGETS, **fields}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in module.named_parameters():
            if f".lora_A.{name}" in key or f".lora_B.{name}" in key:
                sides = tensor[0].numel()
                tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator) / sides**0.5)


def save(module, folder, name="default"):
    """Writes the LoRA as diffusers' training script does; returns the file."""
    layers = peft.get_peft_model_state_dict(module, adapter_name=name)
    told = {k: sorted(x) if isinstance(x, set) else x for k, x in fields_of(module, name).items()}
    SanaPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told
    )
    return folder / "pytorch_lora_weights.safetensors"


def fields_of(module, name="default"):
    return module.peft_config[name].to_dict()


@pytest.mark.parametrize(
    "kind, fields",
    sorted({("plain", name) for name in CONFIGS} | {(kind, "patterns") for kind in KINDS}),
)
def test_the_velocity_is_that_of_a_file_of_peft(kind, fields, tmp_path):
    module, config = toy.transformer(**KINDS[kind])
    params = toy.params(module, config)
    add_adapter(module, **CONFIGS[fields])
    file = tmp_path / "lora.safetensors"
    save(module, tmp_path).rename(file)
    if fields == "patterns":  # peft sorts them: what the file says is another LoRA by now
        rewrite(file, lambda told: told | {f"transformer.{k}": v for k, v in PATTERNS.items()})
    attached = attach(params, [(read_adapter(file, config), 1)])
    toy.assert_close(velocity(config, attached), velocity_of(module, config), 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(velocity(config, params), velocity_of(module, config), 1e-2)


def rewrite(file, change):
    """Changes the metadata of a file."""
    with safe_open(file, framework="np") as opened:
        header, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
    header[METADATA] = json.dumps(change(json.loads(header[METADATA])))
    safetensors.numpy.save_file(tensors, file, header)


@pytest.fixture(scope="module")
def config():
    return toy.transformer()[1]


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    """A whole LoRA of two sites."""
    file = tmp_path_factory.mktemp("written") / "lora.safetensors"
    write_adapter(file, random_adapter(config, (r"blocks/attention/q", "proj_out")), config, 2)
    return file


@pytest.fixture
def spoil(written, tmp_path):
    """Writes a copy with other tensors, or other metadata."""

    def change(tensors=lambda found: found, metadata=lambda told: told):
        with safe_open(written, framework="np") as opened:
            header = opened.metadata()
            found = {key: opened.get_tensor(key) for key in opened.keys()}
        if told := metadata(json.loads(header.pop(METADATA))):
            header[METADATA] = told if isinstance(told, str) else json.dumps(told)
        file = tmp_path / "lora.safetensors"
        found = {key: np.array(x, order="C") for key, x in tensors(found).items()}
        safetensors.numpy.save_file(found, file, header)
        return file

    return change


def same(one, other) -> bool:
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (one, other)]
    equal = [np.array_equal(flat[0][name], flat[1][name]) for name in flat[0]]
    return flat[0].keys() == flat[1].keys() and all(equal)


def test_what_was_read_is_written_and_read_again(config, tmp_path):
    module, _ = toy.transformer()
    add_adapter(module, **CONFIGS["rank-stabilised"])
    first = read_adapter(save(module, tmp_path), config)
    write_adapter(tmp_path / "again.safetensors", first, config)
    assert same(read_adapter(tmp_path / "again.safetensors", config), first)


def test_without_metadata_alpha_is_the_rank(config, written, spoil):
    scales = [
        read_adapter(file, config)["proj_out"]["scale"]
        for file in (written, spoil(metadata=lambda told: None))
    ]
    assert scales == [0.5, 1.0]


NAMES = {
    "kohya": ("lora_unet_", lambda name: name.replace(".", "_"), "lora_down", "lora_up"),
    "kohya, transformer": (
        "lora_transformer_",
        lambda name: name.replace(".", "_"),
        "lora_down",
        "lora_up",
    ),
    "ComfyUI": ("diffusion_model.", str, "lora_A", "lora_B"),
    "no prefix": ("", str, "lora.down", "lora.up"),
}


@pytest.mark.parametrize("names", NAMES)
def test_names_of_other_programs_are_read(names, config, written, spoil):
    prefix, spell, *halves = NAMES[names]

    def renamed(found):
        made = {}
        for key, array in found.items():
            name, half = key.removeprefix("transformer.").split(".lora_")
            made[f"{prefix}{spell(name)}.{halves['AB'.index(half[0])]}.weight"] = array
            made[f"{prefix}{spell(name)}.alpha"] = np.array(2, np.float16)
        return made

    found = read_adapter(spoil(renamed, metadata=lambda told: None), config)
    assert same(found, read_adapter(written, config))


def test_a_folder_of_pefts_own_is_read(config, tmp_path):
    module, _ = toy.transformer()
    fields = dict(CONFIGS["alpha is another"], target_modules=["to_q", "proj_out"])
    wrapped = peft.get_peft_model(module, peft.LoraConfig(init_lora_weights=False, **fields))
    wrapped.save_pretrained(tmp_path)
    found = read_adapter(tmp_path / "adapter_model.safetensors", config)
    layer = wrapped.base_model.model.transformer_blocks[1].attn2.to_q
    update = layer.get_delta_weight("default").detach().numpy().T
    site = found["blocks"]["cross_attention"]["q"]
    np.testing.assert_allclose(site["scale"][1] * site["a"][1] @ site["b"][1], update, atol=1e-5)


def test_halves_of_sixteen_bits_are_read(config, written, spoil):
    narrow = spoil(lambda found: {key: x.astype("bfloat16") for key, x in found.items()})
    a = read_adapter(narrow, config)["proj_out"]["a"]
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, read_adapter(written, config)["proj_out"]["a"], rtol=4e-3)


Q = "transformer.transformer_blocks.1.attn1.to_q"


def without(*ends):
    return lambda found: {key: x for key, x in found.items() if not key.endswith(ends)}


def put(key, make):
    return lambda found: found | {key: make(found[f"{Q}.lora_A.weight"])}


def moved(new):
    return lambda found: {key.replace(Q, new): x for key, x in found.items()}


SPOILT = {
    "of no rank": (put(f"{Q}.lora_A.weight", lambda a: a[:0]), "rank 0"),
    "of another width": (
        put(f"{Q}.lora_A.weight", lambda a: a[:, 1:]),
        r"\[4, 63\].*another network",
    ),
    "of another rank in B": (put(f"{Q}.lora_B.weight", lambda a: a.T[:, 1:]), r"\[64, 3\]"),
    "without axes": (put(f"{Q}.lora_A.weight", lambda a: a[0, 0]), "rank 0"),
    "of a convolution in two axes": (
        lambda found: {
            key.replace(Q, "transformer.transformer_blocks.1.ff.conv_point"): np.ones(
                (64, 4) if key.endswith("B.weight") else (4, 160), np.float32
            )
            for key in found
            if key.startswith(Q)
        },
        r"instead of \[4, 160, 1, 1\]",
    ),
    "of more layers": (moved("transformer.transformer_blocks.3.attn1.to_q"), "another network"),
    "of Flux": (moved("transformer.single_transformer_blocks.0.attn.to_q"), "another network"),
    "of NVlabs' names": (moved("transformer.blocks.1.attn.qkv"), r"blocks.1.attn.qkv.lora_A"),
    "of a depthwise convolution": (
        moved("transformer.transformer_blocks.1.ff.conv_depth"),
        "conv_depth.*depthwise",
    ),
    "of a text encoder": (
        put("text_encoder.q_proj.lora_A.weight", np.array),
        "text encoder: it is",
    ),
    "of kohya's text encoder": (put("lora_te_q_proj.lora_down.weight", np.array), "text encoder"),
    "NaN": (put(f"{Q}.lora_B.weight", lambda a: np.nan * a.T), f"{Q}.lora_B.weight holds NaN"),
    "whole numbers": (put(f"{Q}.lora_A.weight", lambda a: a.astype(np.int32)), "floating point"),
    "A without B": (without(f"{Q[-22:]}.lora_B.weight"), "to_q.lora_A.weight lacks its other half"),
    "B without A": (without(f"{Q[-22:]}.lora_A.weight"), "to_q.lora_B.weight lacks its other half"),
    "no LoRA": (
        lambda found: {"proj_out.weight": np.ones(3)},
        "holds no LoRA, but proj_out.weight",
    ),
    "nothing": (lambda found: {}, "holds no LoRA, but nothing"),
    "DoRA": (put(f"{Q}.lora_magnitude_vector", np.array), "lora_magnitude_vector is of DoRA"),
    "DoRA of others": (put("lora_unet_x.dora_scale", np.array), "dora_scale is of DoRA"),
    "biases": (put(f"{Q}.lora_B.bias", lambda a: a[0]), "lora_B.bias is no part"),
    "LoCon": (put(f"{Q}.lora_mid.weight", np.array), "lora_mid.weight is no part"),
    "both spellings": (put(f"{Q}.lora_down.weight", np.array), "twice"),
    "two alphas": (put(f"{Q}.alpha", lambda a: a[0, 0]), "said twice"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_holds_anything_else_is_refused_by_name(how, config, spoil):
    change, told = SPOILT[how]
    with pytest.raises(UserError, match=told) as error:
        read_adapter(spoil(change), config)
    assert "lora.safetensors" in str(error.value)


def test_an_alpha_is_one_number(config, spoil):
    for wrong in np.ones(2), np.float32("nan"):
        file = spoil(put(f"{Q}.alpha", lambda a, x=wrong: np.array(x)), lambda told: None)
        with pytest.raises(UserError, match="alpha"):
            read_adapter(file, config)


SAID = {
    "no JSON": (lambda told: "{", "is not JSON"),
    "no object": (lambda told: "[3]", "no JSON object"),
    "nested": (lambda told: "[" * 5000 + "]" * 5000, "is not JSON"),
    "of another prefix": (lambda told: {"unet.r": 4}, "unet.r"),
    "another rank": (lambda told: told | {"transformer.r": 8}, "of rank 4, but of 8"),
    "another rank by a pattern": (
        lambda told: told | {"transformer.rank_pattern": {"to_q": 2}},
        "to_q is of rank 4, but of 2",
    ),
    "no rank": (lambda told: {"transformer.lora_alpha": 4}, "of rank 4, but of 8"),  # peft's r
    "a pattern that is none": (
        lambda told: told | {"transformer.alpha_pattern": {"to_(q": 2}},
        "alpha_pattern",
    ),
    "no patterns": (lambda told: told | {"transformer.rank_pattern": [1]}, "rank_pattern"),
    "an alpha in letters": (lambda told: told | {"transformer.lora_alpha": "4"}, "lora_alpha"),
    "an alpha that is not finite": (
        lambda told: told | {"transformer.lora_alpha": float("nan")},
        "lora_alpha",
    ),
    "DoRA": (lambda told: told | {"transformer.use_dora": True}, "DoRA"),
    "PiSSA": (lambda told: told | {"transformer.init_lora_weights": "pissa_niter_4"}, "pissa"),
}


@pytest.mark.parametrize("how", SAID)
def test_metadata_that_say_something_else_are_refused(how, config, spoil):
    change, told = SAID[how]
    with pytest.raises(UserError, match=told):
        read_adapter(spoil(metadata=change), config)


def test_a_pattern_has_a_limit_of_time(config, spoil, monkeypatch):
    def slow(pattern, name, timeout):
        raise TimeoutError(f"regex timed out after {timeout} s")

    file = spoil(metadata=lambda told: told | {"transformer.rank_pattern": {"to_[qk]": 4}})
    read_adapter(file, config)
    monkeypatch.setattr("sana_jax.checkpoints.peft.regex.match", slow)
    with pytest.raises(UserError, match=r"rank_pattern has 'to_\[qk\]': regex timed out after 1"):
        read_adapter(file, config)


def test_a_file_that_is_none_is_refused(config, written, tmp_path):
    whole = written.read_bytes()
    for content in whole[:-5], whole[:20], b"", b"version https://git-lfs.github.com/spec/v1\n":
        (tmp_path / "lora.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="whole safetensors|git-LFS"):
            read_adapter(tmp_path / "lora.safetensors", config)
    with pytest.raises(UserError, match="pickled"):
        read_adapter(tmp_path / "pytorch_lora_weights.bin", config)
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        found = safetensors.numpy.load(whole)
        found = {key.replace("transformer.", "base_model.model.", 1): x for key, x in found.items()}
        safetensors.numpy.save_file(found, tmp_path / "lora.safetensors")
        read_adapter(tmp_path / "lora.safetensors", config)
