"""The recipe of a distillation: its keys, and that the configs start from it."""

import runpy
from pathlib import Path

import pytest

from sana_jax.models.dit import PRESETS, SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.training.distillation.recipe import distillation, read_distillation
from sana_jax.training.text_to_image.networks import read_network
from sana_jax.training.text_to_image.recipe import read_recipe

CONFIGS = Path(__file__).parents[3] / "configs"


def load(name, *kind):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*kind)


def test_its_figures_are_the_papers():
    config = distillation(PRESETS["sana_sprint_600m_1024"], 20_000, 512)
    figures, recipe = read_distillation(config), read_recipe(config)
    assert figures.guidance == (4.0, 4.5, 5.0) and figures.warmup_steps == 4000
    assert (figures.angle_mean, figures.angle_std, figures.tangent_constant) == (0.0, 1.6, 0.1)
    assert (figures.consistency, figures.adversarial) == (1.0, 0.5)
    for optimizer in recipe.optimizer, figures.discriminator:
        assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("came", 2e-6, 0.1)
    assert recipe.caption_dropout == 0


@pytest.mark.parametrize("size", ["600m", "1600m"])
def test_the_teacher_is_the_student_without_the_guidance(size):
    student, teacher = (load(f"sprint_{size}_1024", kind) for kind in ("student", "teacher"))
    student, teacher = (read_network(SanaConfig, c, "network") for c in (student, teacher))
    assert student == PRESETS[f"sana_sprint_{size}_1024"]
    assert vars(student) | {"guidance_embedding": None} == vars(teacher)
    with pytest.raises(ValueError, match="neither teacher nor student"):
        load(f"sprint_{size}_1024", "both")


@pytest.mark.parametrize("kind", ["consistency", "both"])
def test_the_student_of_shapes_follows_its_teacher(kind):
    config = load("sprint_shapes", kind)
    assert config.network.depth is None
    assert config.network.guidance_embedding == 0.1
    assert bool(read_distillation(config).adversarial) == (kind == "both")


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="neither consistency nor both"):
        load("sprint_shapes", "teacher")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(lora={"rank": 4}),
        dict(recipe={"int8": ("forward",)}),
        dict(recipe={"follow_start": True}),
        dict(text_encoder={"train": True}),
    ],
)
def test_what_trains_otherwise_is_refused(wrong):
    config = load("sprint_600m_1024", "student")
    config.update(wrong)
    with pytest.raises(UserError, match="a distillation trains the transformer alone"):
        read_distillation(config)
