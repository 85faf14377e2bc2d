"""What a distillation's config may name, and what is refused before anything is written."""

import dataclasses

import pytest

from sana_jax.checkpoints import native
from sana_jax.runtime.errors import UserError
from sana_jax.training.distillation.run import DistillationTraining
from tests.training.text_to_image.toy import load

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(start=None), "config.start is missing"),
        (dict(network__guidance_embedding=None), "config.network.guidance_embedding is missing"),
        (dict(network__qk_norm=True), "is another network than config.network: qk_norm is False"),
        (dict(network__depth=2), "is another network than config.network: depth is 1, not 2"),
        (dict(student="FOLDER/base"), "config.student"),
        (dict(text_encoder__train=True, text_encoder__instruction=False), "config.text_encoder"),
        (dict(lora__rank=2), "config.lora.rank"),
        (dict(loop__evaluate_every=5), "config.loop.evaluate_every=5: a student has no held-out"),
        (dict(distillation__adversarial=-1.0), "config.distillation.adversarial=-1.0"),
        (dict(distillation__blocks=(0, 1)), "config.distillation.blocks=(0, 1)"),
    ],
)
def test_what_cannot_be_distilled_is_refused(config, tmp_path, changes, told):
    base = str(config.parent / "base")
    changes = {k: base if v == "FOLDER/base" else v for k, v in changes.items()}
    with pytest.raises(UserError) as error:
        DistillationTraining(load(config, **changes), str(tmp_path / "run"))
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep_mask", [False, True])
def test_a_teacher_that_is_guided_by_another_mask_is_told(config, tmp_path, caplog, keep_mask):
    base = native.open_folder(config.parent / "base")
    native.save(dataclasses.replace(base, unconditional_mask="prompt"), tmp_path / "teacher")
    changes = dict(start=str(tmp_path / "teacher"), recipe__keep_mask=keep_mask)
    DistillationTraining(load(config, **changes), str(tmp_path / "run"))
    assert ("config.recipe.keep_mask=False, but True of" in caplog.text) is not keep_mask
