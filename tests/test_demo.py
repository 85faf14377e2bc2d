"""The demo as a user meets it: what the browser draws is the file that `sample` writes."""

import base64
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE, commands, mini
from tests.pages.chromium import opened

ROOT = Path(__file__).parents[1]
PROMPT, NEGATIVE = "a cat & a <b>dog</b>", "no fish"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    mini.save(path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def environment(folder):
    """One device, and compilations that the two commands share."""
    changes = dict(PYTHONPATH=str(ROOT), XLA_FLAGS="", JAX_COMPILATION_CACHE_DIR="")
    return os.environ | changes | dict(XDG_CACHE_HOME=str(folder / "caches"))


@pytest.fixture
def demo(folder, environment):
    line = [sys.executable, "-m", "sana_jax.demo", "--checkpoint=checkpoint", "--port=0"]
    with subprocess.Popen(
        line, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_browser_draws_what_sample_draws_to_the_byte(folder, environment, demo):
    with opened() as page:
        url = demo.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url), demo.communicate()[1]
        page.goto(url)
        page.fill("[name=prompt]", PROMPT)
        page.fill("[name=negative_prompt]", NEGATIVE)
        seed = 2**64 - 2  # more than JavaScript's numbers can hold
        values = dict(seed=seed, num_steps=3, guidance_scale=2.5, width=32, height=48, count=2)
        for name, value in values.items():
            page.fill(f"[name={name}]", str(value))
        page.evaluate(
            """() => { window.seen = [];
            new MutationObserver(() => seen.push(document.querySelector("#state").textContent))
              .observe(document.querySelector("#state"), {childList: true}); }"""
        )
        page.click("#draw")
        page.wait_for_selector(".drawn img, #state.wrong", timeout=1000 * PATIENCE)
        assert "drawn in" in page.inner_text("#state")
        told = [text for text in page.evaluate("seen") if text.startswith("step")]
        assert told == [f"step {i} of 3" for i in (1, 2, 3)]
        links = page.locator(".drawn a").evaluate_all(
            "links => links.map((a) => [a.download, a.href])"
        )
        assert f"seed {seed}" in page.locator(".drawn figcaption").first.inner_text()
        page.click(".drawn summary")
        assert f"--seed={seed}" in page.inner_text("code")
        size = page.locator(".drawn img").first.evaluate("i => [i.naturalWidth, i.naturalHeight]")
        assert size == [32, 48] and "<b>dog" in page.locator(".drawn img").first.get_attribute(
            "alt"
        )

        page.fill("[name=seed]", "x")
        page.click("#draw")
        page.wait_for_selector("#state.wrong")
        assert "seed='x': it takes a whole number" in page.inner_text("#state")
        assert {
            request.removeprefix(url) for request in page.requests if "data:" not in request
        } == {
            "",
            "draw",
        }
    flags = {n: x for n, x in values.items() if n != "count"}
    line = [sys.executable, "-m", "sana_jax.sample", "--checkpoint=checkpoint", "--out=drawn"]
    line += [f"--prompt={PROMPT}", f"--negative_prompt={NEGATIVE}", "--num_images_per_prompt=2"]
    line += [f"--{name}={value}" for name, value in flags.items()]
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [name for name, _ in links] == [f"000000_{seed}.png", f"000001_{seed + 1}.png"]
    for name, uri in links:
        content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
        assert content == (folder / "drawn" / name).read_bytes()

    demo.send_signal(signal.SIGTERM)
    _, stderr = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 143 and stderr.splitlines() == ["terminated"]


MISTAKES = [
    ([], "--checkpoint is missing"),
    (["--checkpoint=missing", "--port=0"], "missing"),
    (["--checkpoint=checkpoint", "--port=65536"], "--port=65536"),
    (["--checkpoint=checkpoint", "--host=no.such.host."], "--host=no.such.host. --port=7860"),
    (["--checkpoint=checkpoint", "--lora=gone.safetensors", "--port=0"], "gone.safetensors"),
    (["--checkpoint=x", "--no_instruction", "--instruction_file=y"], "contradict each other"),
]


@pytest.fixture(scope="module")
def answers(folder, environment):
    return commands.answers("sana_jax.demo", MISTAKES, [], folder, environment)


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_status_2(answers, arguments, words):
    status, stdout, stderr = answers[tuple(arguments)]
    assert status == 2 and words in stderr and stderr.count("\n") == 1 and stdout == ""
