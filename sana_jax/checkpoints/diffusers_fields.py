"""The fields of the configs that diffusers 0.42 and transformers 5 write, and what each means here.

A field is obeyed by who reads it (diffusers_configs.py, diffusers.py), has to have the value for
which we compute the same, or changes nothing here. The tests compare these tables with the classes
of the installed libraries: a new field has to find its place.
"""

from typing import Any, NamedTuple

from absl import logging

from sana_jax.diffusion.flow import NUM_TIMESTEPS


class Fields(NamedTuple):
    """The fields of one class.

    only: field -> its default in the library, then the values for which we compute the same.
    harmless: why a field changes nothing here -> the fields.
    """

    obeyed: tuple[str, ...]
    only: dict[str, tuple[Any, ...]]
    harmless: dict[str, tuple[str, ...]]

    def names(self) -> list[str]:
        return [
            *self.obeyed,
            *self.only,
            *(name for some in self.harmless.values() for name in some),
        ]


_TRAINING = "it works while the network trains there"
_NO_DYNAMIC = "only dynamic shifting, which is refused, reads it"
_OTHER_GRIDS = {f"use_{kind}_sigmas": (False, False) for kind in ("karras", "exponential", "beta")}
_TIMESTEPS = {"num_train_timesteps": (NUM_TIMESTEPS, NUM_TIMESTEPS)}

SCM = "SCMScheduler"  # of Sprint's pipelines
SCHEDULERS = {
    "DPMSolverMultistepScheduler": Fields(
        obeyed=("flow_shift",),
        only={
            "use_flow_sigmas": (False, True),
            "prediction_type": ("epsilon", "flow_prediction"),
            "algorithm_type": ("dpmsolver++", "dpmsolver++"),
            "solver_order": (2, 2),
            "solver_type": ("midpoint", "midpoint"),
            "lower_order_final": (True, True),
            "euler_at_final": (False, False),
            "final_sigmas_type": ("zero", "zero"),
            "use_dynamic_shifting": (False, False),
            "thresholding": (False, False),
            **_OTHER_GRIDS,
            "use_lu_lambdas": (False, False),
            **_TIMESTEPS,
        },
        harmless={
            "use_flow_sigmas, which is needed, puts other noise levels in place of these": (
                *("beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing"),
                *("steps_offset", "rescale_betas_zero_snr", "lambda_min_clipped"),
            ),
            "only thresholding, which is refused, reads it": (
                *("dynamic_thresholding_ratio", "sample_max_value"),
            ),
            "only the prediction of noise, which is refused, reads it": ("variance_type",),
            _NO_DYNAMIC: ("time_shift_type",),
        },
    ),
    "FlowMatchEulerDiscreteScheduler": Fields(
        obeyed=("shift",),
        only={
            "use_dynamic_shifting": (False, False),
            "stochastic_sampling": (False, False),
            **_OTHER_GRIDS,
            "invert_sigmas": (False, False),
            "shift_terminal": (None, None),
            **_TIMESTEPS,
        },
        harmless={
            _NO_DYNAMIC: (
                *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
                "time_shift_type",
            ),
        },
    ),
    SCM: Fields(
        obeyed=(),
        only={"prediction_type": ("trigflow", "trigflow")},
        harmless={
            "the state is multiplied by it before a step, and divided after": ("sigma_data",),
            "angles, which are continuous, replace timesteps": ("num_train_timesteps",),
        },
    ),
}
TRANSFORMER = Fields(
    obeyed=(
        *("in_channels", "out_channels", "num_attention_heads", "attention_head_dim"),
        *("num_layers", "num_cross_attention_heads", "cross_attention_head_dim"),
        *("cross_attention_dim", "caption_channels", "mlp_ratio", "attention_bias"),
        *("sample_size", "patch_size", "interpolation_scale", "qk_norm", "timestep_scale"),
        *("guidance_embeds", "guidance_embeds_scale"),
    ),
    only={
        "norm_elementwise_affine": (False, False, None),
        "norm_eps": (1e-6, 1e-6, None),
    },
    harmless={
        _TRAINING: ("dropout",),
    },
)
AUTOENCODER = Fields(
    obeyed=(
        *("in_channels", "latent_channels", "attention_head_dim", "scaling_factor"),
        *("encoder_block_types", "decoder_block_types", "encoder_block_out_channels"),
        *("decoder_block_out_channels", "encoder_layers_per_block", "decoder_layers_per_block"),
        *("encoder_qkv_multiscales", "decoder_qkv_multiscales", "upsample_block_type"),
        *("downsample_block_type", "decoder_norm_types", "decoder_act_fns", "encoder_out_shortcut"),
        *("decoder_in_shortcut", "decoder_conv_act_fn"),
    ),
    only={},
    harmless={},
)
TEXT_ENCODER = Fields(
    obeyed=(
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
        *("attn_logit_softcapping", "sliding_window", "layer_types", "rms_norm_eps"),
        *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    ),
    only={
        # The three activations are spellings of one formula; "gelu" is the exact function.
        "hidden_activation": (*("gelu_pytorch_tanh",) * 2, "gelu_new", "gelu_fast"),
        "attention_bias": (False, False, None),
        "use_bidirectional_attention": (None, None, False),
        "quantization_config": (None, None),
    },
    harmless={
        _TRAINING: ("attention_dropout", "initializer_range"),
        "only the head, which is not read, has it": (
            *("final_logit_softcapping", "tie_word_embeddings", "id2label", "label2id"),
            *("problem_type", "architectures"),
        ),
        "of the generation of text": (
            *("use_cache", "cache_implementation", "is_encoder_decoder"),
            *("pad_token_id", "eos_token_id", "bos_token_id"),
        ),
        "it says what the library's functions return": (
            *("output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
        ),
        "the files say it themselves": ("dtype", "torch_dtype", "transformers_version"),
        "no Gemma 2 reads it": ("chunk_size_feed_forward", "hidden_act"),
    },
)


def check_supported(what: str, fields: Fields, config: dict[str, Any]) -> None:
    """Raises ValueError, which begins with `what`, for a field whose value is not supported.

    Logs the fields that no table has: of a newer library, or of somebody else.
    """
    for name, (default, *ours) in fields.only.items():
        if (found := config.get(name, default)) not in ours:
            raise ValueError(f"{what} {name} {found!r} is not supported, only {ours[0]!r}")
    unknown = sorted({name for name in config if name[:1] != "_"} - {*fields.names()})
    if unknown:
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        logging.warning("%s: fields that are not known here are ignored: %s", what, shown)
