"""The gallery shows what manifest.jsonl says of pictures, in Chromium where there is one."""

import json

import pytest

from sana_jax.pages import gallery
from sana_jax.runtime.errors import UserError
from tests.pages import made
from tests.pages.chromium import opened

PROMPTS = made.EVIL, "two Red cats", "a dog"


def batch_run(folder, guidance: float, prompts=PROMPTS, seeds=2, size=(64, 48)):
    """Writes what `sample` leaves: of each prompt and seed a picture and its line."""
    folder.mkdir(parents=True)
    lines = []
    for number, (prompt, seed) in enumerate((p, s) for p in prompts for s in range(seeds)):
        file = f"{number:06d}_{seed}.png"
        made.picture(folder / file, number, size)
        line = {"file": file, "prompt": prompt, "seed": seed, "num_steps": 4 + number % 2}
        line |= {"guidance_scale": guidance, "checkpoint": "shapes", "sha256": "0", "key": "1"}
        lines.append(json.dumps(line))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def one(tmp_path):
    return batch_run(tmp_path / "a b#", 4.5)


def test_fields_that_all_pictures_share_are_stored_once(one, tmp_path):
    content, notes = gallery.page([str(one)], tmp_path / "page.html", 10**6)
    (run,) = made.data_of(content)["runs"]
    assert notes == [] and run["name"] == "a b#" and len(run["pictures"]) == 6
    assert run["common"] == {"guidance_scale": 4.5, "checkpoint": "shapes"}
    assert run["varying"] == ["prompt", "seed", "num_steps"]
    assert run["pictures"][1]["settings"] == {"prompt": made.EVIL, "seed": 1, "num_steps": 5}
    assert run["pictures"][1]["link"] == "a%20b%23/000001_1.png"


def test_what_is_not_whole_is_counted_and_never_followed(one, tmp_path):
    manifest = one / "manifest.jsonl"
    *lines, last = manifest.read_text().splitlines()
    outside = json.dumps(json.loads(last) | {"file": "../secret.png"})
    extra = json.dumps(json.loads(lines[0]) | {"file": "gone.png", "score": float("nan")})
    manifest.write_text("\n".join([*lines, outside, "not a line", extra, last[:40]]))
    made.picture(tmp_path / "secret.png")
    content, notes = gallery.page([str(one)], tmp_path / "page.html", 10**6)
    (run,) = made.data_of(content)["runs"]
    assert notes[0] == f"{one}: 2 lines of manifest.jsonl are not of `sample`"
    assert (
        notes[1] == f"1 pictures cannot be shown, such as {one}/gone.png: No such file or directory"
    )
    assert [each["file"] for each in run["pictures"]][-1] == "gone.png"
    assert run["pictures"][-1]["settings"]["score"] == "NaN"


def test_names_that_no_file_can_have_are_counted(one, tmp_path):
    manifest = one / "manifest.jsonl"
    *_, last = manifest.read_text().splitlines()
    for name in "\ud800.png", "\0.png", "..":
        with manifest.open("a") as file:
            file.write(json.dumps(json.loads(last) | {"file": name}) + "\n")
    _, (note,) = gallery.page([str(one)], tmp_path / "page.html", 10**6)
    assert note.startswith("3 pictures cannot be shown, such as ")


def test_fifty_pictures_stay_below_five_megabytes_and_the_first_are_shown_of_too_many(tmp_path):
    folder = batch_run(tmp_path / "many", 4.5, [f"prompt {i}" for i in range(50)], 1, (128, 96))
    content, notes = gallery.page([str(folder)], tmp_path / "page.html", 5 * 10**6)
    assert len(content) < 5 * 10**6 and notes == []
    content, notes = gallery.page([str(folder)], tmp_path / "page.html", 120_000)
    assert len(content) < 120_000
    assert notes == [
        f"{folder}: the first 20 of 50 pictures are shown; raise --megabytes to see the others"
    ]


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", "there is no such folder"),
        ("file", "is no folder"),
        ("run", "has no manifest.jsonl, which `sample` writes; a run of a training"),
        ("empty", "names no picture yet"),
    ],
)
def test_a_folder_without_pictures_is_named(tmp_path, name, words):
    made.run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/manifest.jsonl").write_text('{"file": "0000')
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        gallery.page([str(tmp_path / name)], tmp_path / "page.html", 10**6)


def test_chromium_filters_and_shows_two_runs_side_by_side(one, tmp_path):
    other = batch_run(tmp_path / "other", 2.0, PROMPTS[1:] + ("new",))
    out = tmp_path / "page.html"
    out.write_bytes(gallery.page([str(one), str(other)], out, 10**6)[0])
    with opened() as page:
        page.goto(f"file://{out}")
        cards, count = page.locator(".card"), page.locator("#count")
        assert cards.count() == 8 and count.inner_text() == "8 of 8"
        assert cards.nth(0).locator("img").count() == 1
        assert cards.nth(0).locator(".absent").inner_text() == "none in other"
        assert cards.nth(2).locator("img").count() == 2
        width = "images => Promise.all(images.map((i) => i.decode().then(() => i.naturalWidth)))"
        assert page.locator(".card img").evaluate_all(width) == [64] * 12
        table = page.locator("#differences td").all_inner_texts()
        assert table == ["guidance_scale", "4.5", "2"]

        page.locator("[name=prompt]").fill("RED cat")
        assert count.inner_text() == "2 of 8"
        page.locator("[name=seed]").select_option("1")
        assert count.inner_text() == "1 of 8" and "two Red cats" in cards.inner_text()
        page.locator("[name=prompt]").fill("")
        page.locator("[name=seed]").select_option("all")
        page.locator("[name=num_steps]").select_option("5")
        assert count.inner_text() == "4 of 8"

        page.locator("[name=num_steps]").select_option("all")
        cards.nth(2).click()
        dialog = page.locator("dialog")
        assert "two Red cats" in dialog.inner_text()
        assert dialog.locator("td.differs").all_inner_texts() == ["4.5", "2"]
        link = dialog.locator("a").first
        assert link.evaluate("a => a.href") == f"file://{tmp_path}/a%20b%23/000002_0.png"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert "onerror" in dialog.inner_text() and page.title() == "Gallery: a b# | other"
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert [url for url in page.requests if not url.startswith("data:")] == [page.url]
