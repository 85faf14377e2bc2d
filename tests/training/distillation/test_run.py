"""A tiny distillation, from its config to a model that draws; killed, it ends to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from sana_jax.checkpoints import native
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.distillation.run import DistillationTraining
from sana_jax.training.text_to_image.result import open_workdir
from tests.training.text_to_image.toy import load

pytestmark = pytest.mark.usefixtures("one_device")
ROOT = Path(__file__).parents[3]
STEPS = 6


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    DistillationTraining(load(config, loop__images_every=STEPS), str(workdir)).run()
    return workdir


def test_its_result_is_a_student_that_draws(config, unbroken):
    model, base = (native.open_folder(at) for at in (unbroken / "model", config.parent / "base"))
    assert model.dit.is_sprint and not base.dit.is_sprint
    assert model.provenance["steps"] == STEPS and model.provenance["start"] == "base"
    kernels = [np.asarray(at.params["dit"]["proj_out"]["kernel"]) for at in (model, base)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1
    pipe = SanaPipeline.from_pretrained(str(unbroken / "model"), dtype="float32")
    (image,) = pipe("a red cat", height=16, width=16, num_steps=1, output="np")
    assert image.shape == (16, 16, 3)
    assert (unbroken / "images" / f"samples_{STEPS:08}.png").is_file()
    newest = open_workdir(unbroken).params["dit"]
    np.testing.assert_array_equal(newest["proj_out"]["kernel"], kernels[0])


def test_both_losses_are_in_every_row(unbroken):
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all({"consistency", "generator", "discriminator"} <= row.keys() for row in rows)


RUN = """
import sys
from pathlib import Path
import jax
devices = jax.devices()[:1]
jax.devices = lambda: devices
from sana_jax.training.distillation.run import DistillationTraining
from tests.training.text_to_image.toy import load
DistillationTraining(load(Path(sys.argv[1]), loop__images_every=6), sys.argv[2]).run()
"""


@pytest.mark.slow  # two more trainings, half a minute
def test_killed_between_the_two_steps_it_ends_to_the_bit(config, unbroken, tmp_path):
    """After the third step, the student's second: the discriminator's comes next."""
    line = [sys.executable, "-c", RUN, str(config), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints/3").exists():
        assert run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    DistillationTraining(load(config, loop__images_every=STEPS), str(tmp_path)).run()
    (ours, _), (theirs, _) = (read_newest(at, "params") for at in (tmp_path, unbroken))
    assert ours["leaves"] == theirs["leaves"] and ours["iterators"] == theirs["iterators"]
    optimizers = {name.split("/")[1] for name in ours["leaves"] if name.startswith("opt_state/")}
    assert optimizers == {"student", "discriminator"}
    ours, theirs = (load_file(at / "model/dit.safetensors") for at in (tmp_path, unbroken))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_student_goes_on_from_a_student(config, unbroken, tmp_path):
    changes = dict(student=str(unbroken / "model"), recipe__steps=1, distillation__adversarial=0.0)
    run = DistillationTraining(load(config, **changes), str(tmp_path / "run"))
    with jax.set_mesh(run.mesh):
        state = run._start(lambda: nn.unbox(run.task.init(jax.random.key(0))))
    theirs = native.open_folder(unbroken / "model").params["dit"]["proj_out"]["kernel"]
    np.testing.assert_array_equal(state.params["dit"]["proj_out"]["kernel"], theirs)
