"""A page holds everything that it needs, and no text of a user can break out of its data."""

import re
from pathlib import Path

import pytest

from sana_jax.pages import page
from sana_jax.runtime.errors import UserError
from tests.pages import made

TEMPLATES = sorted(path.name for path in page.HERE.glob("*.html"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_filled_and_name_nothing_outside(template):
    data = {"text": made.EVIL, "number": 1e-300}
    made_page = page.render(template, data)
    assert made.data_of(made_page) == data
    text = made_page.decode()
    assert not re.search(r"\{\{[\w.]+\}\}", text)
    assert text.count("</script>") == text.count("<script")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", text)
    assert "default-src 'none'" in text


def test_numbers_that_json_has_not_are_refused():
    with pytest.raises(ValueError):
        page.as_json({"loss": float("nan")})


def test_a_script_gets_text_for_numbers_that_it_has_not():
    given = {
        "a": [float("nan"), -float("inf"), 1.5, None],
        "b": {"seed": 2**64 - 1, "c": 2**53 - 1},
    }
    seed = str(2**64 - 1)
    found = {"a": ["NaN", "-Infinity", 1.5, None], "b": {"seed": seed, "c": 2**53 - 1}}
    assert page.for_script(given) == found


def test_every_template_and_its_parts_are_in_the_package():
    files = {path.suffix for path in page.HERE.iterdir() if path.is_file()} - {".py", ".md"}
    project = (Path(page.__file__).parents[2] / "pyproject.toml").read_text()
    assert files and all(f'"pages/*{suffix}"' in project for suffix in files)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    page.save(tmp_path / "a.html", b"one")
    page.save(tmp_path / "a.html", b"two")
    assert (tmp_path / "a.html").read_bytes() == b"two"
    with pytest.raises(UserError, match="--out=.*b.html: No such file"):
        page.save(tmp_path / "missing/b.html", b"")
