"""The bundled models, which this project trained: small, and they draw what they are told."""

import json
import math

from sana_jax.checkpoints.find import bundled
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.shapes import evaluation

LIMIT = 15 * 2**20  # bytes a file


def test_its_files_are_small_and_say_how_they_came_to_be():
    files = [path for path in bundled()["shapes"].rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= LIMIT
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    made = json.loads((bundled()["shapes"] / "model.json").read_text())["provenance"]
    assert made["trained"] and made["ema"] and made["steps"] > 0
    phases = [phase["phase"] for phase in made["autoencoder"]["phases"]]
    assert phases[-1] == "local_refinement"
    checkpoint = open_checkpoint("shapes")
    assert {"dit", "vae", "text_encoder"} <= checkpoint.params.keys()


def test_it_draws_what_it_is_told():
    """Prompts of combinations that it never saw; chance is 1 of 8 colours and of 8 shapes."""
    options = evaluation.Options(count=32)
    found, _ = evaluation.measure("shapes", options)
    print({key: found[key] for key in ("overall", "facts", "colour", "shape", "position")})
    assert found["colour"] > 0.95 and found["facts"] > 0.9 and found["shape"] > 0.85
    assert found["position"] > 0.9 and found["overall"] > 0.6 > 4 * found["control_shuffled"]


def test_its_student_takes_a_few_steps_and_shares_the_other_networks():
    folder = bundled()["shapes-sprint"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 9 * 10**6
    said = json.loads((folder / "model.json").read_text())
    assert said["shared"]["folder"] == "../shapes" and "vae.safetensors" in said["shared"]["files"]
    options = evaluation.Options(count=32, guidance_scale=2.0, angles=[math.pi / 2, 1.0, 0.0])
    found, _ = evaluation.measure("shapes-sprint", options)
    print({key: found[key] for key in ("overall", "facts", "colour", "shape", "position")})
    assert found["colour"] > 0.95 and found["facts"] > 0.85 and found["overall"] > 0.5
