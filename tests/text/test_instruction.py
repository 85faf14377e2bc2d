"""The complex human instruction, wherever it comes from."""

import importlib.machinery
import importlib.util
import inspect
import shutil

import pytest
from diffusers import SanaPipeline

from sana_jax.runtime.errors import UserError
from sana_jax.text.instruction import Instruction, find_instruction


def test_instruction_of_diffusers():
    """The very text that this diffusers puts before its prompts."""
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    text = "\n".join(parameters["complex_human_instruction"].default)
    assert text.endswith(" ")
    found = find_instruction()
    assert found.sha256 == Instruction(text, "").sha256
    assert len(found.sha256) == 64 and "diffusers" in found.source


@pytest.fixture
def other_diffusers(tmp_path, monkeypatch):
    """Makes find_spec find a diffusers whose SanaPipeline is in the given source."""

    def install(source: str | None):
        folder = tmp_path / "diffusers"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "pipelines/sana").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        if source is not None:
            (folder / "pipelines/sana/pipeline_sana.py").write_text(source)
        spec = importlib.machinery.PathFinder.find_spec("diffusers", [str(tmp_path)])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return install


PIPELINE = """
class SanaPipeline:
    def __call__(self, prompt, steps=2, complex_human_instruction={}, size=3):
        pass
"""


def test_instruction_of_another_diffusers(other_diffusers):
    other_diffusers(PIPELINE.format('["one", "é: "]'))
    found = find_instruction()
    assert found.text == "one\né: "
    assert found.sha256 == "d9bc541898513133ca2c1d61aeab3275485faa94fdaacd46ec02c09cc1ccb5b0"


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "class SanaPipeline:\n    pass",
        "class SanaPipeline:\n    def __call__(self): pass",
        "class SanaPipeline:\n    def __call__(self, complex_human_instruction): pass",
        PIPELINE.format("None"),
        PIPELINE.format("[1, 2]"),
        PIPELINE.format("DEFAULT"),
        PIPELINE.format("["),
    ],
)
def test_diffusers_that_is_not_understood(source, other_diffusers):
    other_diffusers(source)
    assert find_instruction() is None


def test_no_diffusers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_instruction() is None


@pytest.mark.parametrize(
    "content, text",
    [
        ("one\n  two: \n", "one\n  two: "),
        ("one\n\n", "one\n"),
        ("one ", "one "),
        ("\ufeffone\r\ntwo: \r\n", "one\ntwo: "),  # as Windows writes it
    ],
)
def test_instruction_of_a_text_file(content, text, tmp_path):
    path = tmp_path / "instruction.txt"
    path.write_bytes(content.encode())
    found = find_instruction(path)
    assert (found.text, found.source) == (text, "instruction.txt")
    assert find_instruction(str(path)) == found


def test_instruction_of_a_yaml_file(tmp_path):
    for name in "config.yaml", "CONFIG.YML":
        path = tmp_path / name
        path.write_text("text_encoder:\n  chi_prompt:\n    - 'one:'\n    - 'two: '\nother: 1\n")
        assert find_instruction(path) == Instruction("one:\ntwo: ", name)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "model: 1",
        "text_encoder: 1",
        "text_encoder: {chi_prompt: [1]}",
        "text_encoder: [",
        "- 1",
    ]
    + ["text_encoder: {chi_prompt: none}"],
)
def test_yaml_file_without_instruction(content, tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(content)
    with pytest.raises(
        UserError, match="config.yml has no list of strings text_encoder.chi_prompt"
    ):
        find_instruction(path)


@pytest.mark.parametrize(
    "content, words",
    [("", "is empty"), (" \n\n", "is empty"), ("\0\0", "is not UTF-8"), ("a\0b\0", "is not UTF-8")],
)
@pytest.mark.parametrize("name", ["instruction.txt", "config.yaml"])
def test_a_file_that_was_cut_to_nothing_is_refused(content, words, name, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {words}"):
        find_instruction(tmp_path / name)


def test_what_stands_beside_the_instruction_is_not_constructed(tmp_path):
    path = tmp_path / "config.yaml"
    many = "\n".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 30))
    beside = f"when: 2024-99-99\ntag: !unknown x\nk0: &k0 {{a: 1}}\n{many}\n"
    path.write_text(beside + "text_encoder:\n  chi_prompt: [&a 'one:', *a, '2']\n")
    assert find_instruction(path) == Instruction("one:\none:\n2", "config.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "text_encoder: {chi_prompt: [2024-01-01]}",
        "text_encoder: {chi_prompt: [!!str {a: b}]}",
        "text_encoder: *k",
        'text_encoder: {chi_prompt: ["\\ud800"]}',
        "text_encoder: " + "[" * 5000,
        "text_encoder: {chi_prompt: [&a '" + "x" * 2000 + "'" + ", *a" * 200 + "]}",
    ],
)
def test_a_yaml_file_that_asks_for_more_is_refused(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="config.yaml has no list of strings"):
        find_instruction(path)


def test_an_instruction_of_a_megabyte_is_another_file(tmp_path):
    (tmp_path / "book.txt").write_text("a" * 2**20)
    with pytest.raises(UserError, match="book.txt has more than"):
        find_instruction(tmp_path / "book.txt")


def test_instruction_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt cannot be read: No such file"):
        find_instruction(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a folder"):
        find_instruction(tmp_path)
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="picture.txt is not UTF-8"):
        find_instruction(tmp_path / "picture.txt")
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="pointer.txt is a git-LFS pointer"):
        find_instruction(tmp_path / "pointer.txt")


def test_the_tilde_of_an_instruction_file_is_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "told.txt").write_text("Tell: ")
    assert find_instruction("~/told.txt").text == "Tell: "
