"""Hub ids, against a small server on loopback that speaks as much of the hub as is needed."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import toy

NAME, COMMIT = "someone/toy-sana", "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.runtime import cli
from absl import app, flags
def main(argv):
    found = open_checkpoint("{name}", {variant!r}, {revision!r})
    print(found.dit.depth if found.dit else sorted(found.params))
cli.run(main)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, one commit; branch "main" and tag "v1" lead to it."""

    def __init__(self, *args, root: Path, asked: list[str], **kwargs):
        self.root, self.asked = root, asked
        super().__init__(*args, **kwargs)

    def files(self) -> list[str]:
        return [str(p.relative_to(self.root)) for p in sorted(self.root.rglob("*")) if p.is_file()]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        repository, revisions = f"/api/models/{NAME}", ("main", "v1", COMMIT)
        if path in [f"{repository}/revision/{r}" for r in revisions]:
            siblings = [{"rfilename": name} for name in self.files()]
            return self.send({"id": NAME, "sha": COMMIT, "siblings": siblings}, body)
        if path in [f"{repository}/tree/{r}" for r in revisions]:
            tree = [
                {"type": "file", "path": n, "oid": n, "size": (self.root / n).stat().st_size}
                for n in self.files()
            ]
            return self.send(tree, body)
        for revision in revisions:
            prefix = f"/{NAME}/resolve/{revision}/"
            file = self.root / path.removeprefix(prefix)
            if path.startswith(prefix) and file.is_file():
                return self.send(file.read_bytes(), body)
        self.send({"error": "not found"}, body, status=404)

    def send(self, content, body: bool, status: int = 200):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(address, list of the paths asked for, folder) of a server with a toy checkpoint."""
    root, asked = tmp_path_factory.mktemp("hub"), []
    pipe = toy.pipeline()
    pipe.save_pretrained(root)
    pipe.transformer.save_pretrained(root / "transformer", variant="bf16")
    (root / "picture.bin").write_bytes(b"not wanted")
    handler = functools.partial(Hub, root=root, asked=asked)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked, root
    server.shutdown()


def load(cache: Path, name: str = NAME, revision=None, variant=None, **environment: str):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    code = LOAD.format(name=name, revision=revision, variant=variant)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_download_then_cache(hub, tmp_path):
    address, asked, _ = hub
    result = load(tmp_path, HF_ENDPOINT=address)
    assert result.returncode == 0 and result.stdout == "3\n", result.stderr
    assert not any(path.endswith("picture.bin") for path in asked)
    asked.clear()
    result = load(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert result.returncode == 0 and result.stdout == "3\n", result.stderr
    assert asked == []
    # A hub that does not answer is no harm either where the files are there.
    result = load(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0 and result.stdout == "3\n", result.stderr


class Failing(Hub):
    """Its weights come half, or not at all."""

    status = 200

    def send(self, content, body: bool, status: int = 200):
        if not body or not self.path.endswith(".safetensors"):
            return super().send(content, body, status)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content) * (self.status == 200)))
        self.end_headers()
        if self.status == 200:
            self.wfile.write(content[: len(content) // 2])
        self.close_connection = True


@pytest.mark.parametrize("status", [200, 503, 403])
def test_weights_that_do_not_come(hub, tmp_path, monkeypatch, status):
    """A lost connection and a hub in trouble are worth a retry; a refusal is not."""
    _, _, root = hub
    monkeypatch.setattr(Failing, "status", status)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Failing, root=root, asked=[])
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = load(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    assert result.returncode == (2 if status == 403 else 75), result.stderr
    assert f"{NAME} is no folder here" in result.stderr and "Traceback" not in result.stderr


def test_revision(hub, tmp_path):
    address, asked, _ = hub
    asked.clear()
    assert load(tmp_path, revision="v1", HF_ENDPOINT=address).returncode == 0
    assert any("v1" in path for path in asked)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_only_the_asked_variant_is_fetched(hub, tmp_path, variant):
    """And the plain files of the networks that have no such variant."""
    address, asked, _ = hub
    asked.clear()
    result = load(tmp_path, variant=variant, HF_ENDPOINT=address)
    assert result.returncode == 0 and result.stdout == "3\n", result.stderr
    weights = {path.split("/")[-1] for path in asked if "transformer/diffusion" in path}
    middle = ".bf16" if variant else ""
    assert weights == {f"diffusion_pytorch_model{middle}.safetensors"}
    assert any(path.endswith("vae/diffusion_pytorch_model.safetensors") for path in asked)


def test_the_variant_of_an_autoencoder_alone(hub, tmp_path):
    _, _, root = hub
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(root / "vae" / "config.json", alone)
    name = "diffusion_pytorch_model"
    shutil.copy(root / "vae" / f"{name}.safetensors", alone / f"{name}.bf16.safetensors")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, root=alone, asked=[])
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    result = load(tmp_path / "cache", variant="bf16", HF_ENDPOINT=address)
    server.shutdown()
    assert result.returncode == 0 and result.stdout == "['vae']\n", result.stderr


@pytest.mark.parametrize(
    "changes, word, status",
    [
        (dict(name="someone/else"), "someone/else", 2),
        (dict(revision="v2"), NAME, 2),
        (dict(variant="fp8"), "fp8", 2),
        (dict(HF_HUB_OFFLINE="1"), NAME, 2),
        (dict(HF_ENDPOINT="http://127.0.0.1:9"), NAME, 75),  # a hub that may come back
    ],
)
def test_what_is_not_there(hub, tmp_path, changes, word, status):
    address, asked, _ = hub
    asked.clear()
    result = load(tmp_path, **{"HF_ENDPOINT": address, **changes})
    lines = result.stderr.splitlines()
    assert result.returncode == status and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and word in lines[0]
    assert not any(path.endswith(".safetensors") for path in asked)


@pytest.mark.parametrize(
    "files, word",
    [
        ({"model_index.json": '{"_class_name": "SanaControlNetPipeline"}'}, "Sana ControlNet"),
        ({"README.md": "checkpoints/Sana.pth"}, "_diffusers"),  # as NVlabs' are
    ],
)
def test_other_kinds_are_refused_before_their_weights_are_fetched(tmp_path, files, word):
    root, asked = tmp_path / "root", []
    root.mkdir()
    for name, text in (files | {"a.safetensors": "large"}).items():
        (root / name).write_text(text)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, root=root, asked=asked)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = load(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    assert result.returncode == 2 and word in result.stderr, result.stderr
    assert not any(path.endswith(".safetensors") for path in asked)


def test_a_lora_is_fetched_alone(hub, tmp_path):
    address, asked, root = hub
    (root / "pytorch_lora_weights.safetensors").write_bytes(b"a LoRA")
    asked.clear()
    code = (
        f"from sana_jax.checkpoints.find import find_lora; print(find_lora({NAME!r}).read_bytes())"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = clean | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    (root / "pytorch_lora_weights.safetensors").unlink()
    assert result.stdout == "b'a LoRA'\n", result.stderr
    of_the_repository = [path for path in asked if NAME in path]  # the client asks about itself too
    assert of_the_repository, asked
    assert all(path.endswith("pytorch_lora_weights.safetensors") for path in of_the_repository)
