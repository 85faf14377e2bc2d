"""The report shows what runs have written, in Chromium where there is one."""

import json

import pytest

from sana_jax.pages import report, runs
from sana_jax.runtime.errors import UserError
from tests.pages import made
from tests.pages.chromium import opened

STEPS = range(4, 44, 4)


def rows(scale: float) -> list:
    found = []
    for step in STEPS:
        row = {"step": step, "loss": scale / step, "skipped": int(step > 20)}
        row |= {"images_per_second": 10.0, "mfu": 0.25, "data_wait": 0.5, "idle": 0.0}
        found.append(row if step != 12 else row | {"loss": None})
        if step % 8 == 0:
            held = {f"held_out_loss_{sigma}": scale / step for sigma in ("0.1", "0.9")}
            found.append({"step": step, "held_out_loss": scale / step} | held)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs of a sweep: one killed while it wrote a row, both with hostile prompts."""
    folder = tmp_path_factory.mktemp("two") / "sweep"
    for name, scale, rate in ("base", 1.0, 1e-3), ("lr=2", 3.0, 2.0):
        config = {"recipe": {"steps": 40, "rate": rate}, "images": {"prompts": [made.EVIL, "b"]}}
        given = rows(scale) + ['{"step": 44, "lo'] * (scale > 1)
        made.run(folder / name, given, config, pictures=(8, 16), checkpoints=(16,))
    made.picture(folder / "base/images/samples_00000024.png")
    (folder / "lr=2/images/samples_00000024.png").write_bytes(b"half")
    return runs.find([str(folder)])


def test_the_data_of_a_page_is_that_of_the_runs(two):
    content, notes = report.page(two, 10**6)
    assert len(content) < 10**6 and len(notes) == 1 and "samples_00000024.png" in notes[0]
    base, other = made.data_of(content)["runs"]
    assert base["curves"]["loss"][:3] == [[4, 0.25], [8, 0.125], [12, None]]
    assert len(other["curves"]["loss"]) == len(STEPS)
    assert base["summary"] == {
        "steps": "40 of 40",
        "loss": "0.025",
        "held-out loss": "0.025",
        "images/s, median": "10",
        "MFU, median": "25.0%",
        "waiting for data, median": "50.0%",
        "skipped updates": "1",
        "restarts": "0",
    }
    assert [step for step, _ in base["pictures"]["samples"]] == [8, 16, 24]
    assert [step for step, _ in other["pictures"]["samples"]] == [8, 16]
    assert [row[0] for row in other["incidents"]] == [24, 24]
    held_out = {"held_out_loss": 0.0625, "held_out_loss_0.1": 0.0625, "held_out_loss_0.9": 0.0625}
    assert [16, True, held_out] in base["figures"]
    assert json.dumps(base["prompts"]) == json.dumps([made.EVIL, "b"])


def test_the_same_runs_give_the_same_page(two):
    assert report.page(two, 10**6) == report.page(two, 10**6)


def test_a_run_without_anything_has_a_page(tmp_path):
    content, notes = report.page(runs.find([str(made.run(tmp_path / "run"))]), 10**6)
    assert notes == [] and made.data_of(content)["runs"][0]["curves"] == {}
    (tmp_path / "page.html").write_bytes(content)
    with opened() as page:
        page.goto(f"file://{tmp_path}/page.html")
        text = page.inner_text("main")
    for words in (
        "No row of metrics yet",
        "No pictures",
        "No checkpoint",
        "without a config",
        "None:",
    ):
        assert words in text


def test_fifty_sheets_stay_below_five_megabytes_and_more_are_left_out_evenly(tmp_path):
    folder = made.run(tmp_path / "run", rows(1.0))
    for step in range(50):
        made.picture(folder / f"images/samples_{step:08d}.png", step, size=(320, 80))
    found = runs.find([str(folder)])
    content, notes = report.page(found, 5 * 10**6)
    (sheets,) = made.data_of(content)["runs"][0]["pictures"].values()
    assert len(sheets) == 50 and len(content) < 5 * 10**6 and notes == []
    content, notes = report.page(found, 10**5)
    (sheets,) = made.data_of(content)["runs"][0]["pictures"].values()
    steps = [step for step, _ in sheets]
    assert 2 < len(steps) < 50 and (steps[0], steps[-1]) == (0, 49) and len(content) < 10**5
    assert notes == [
        f"{50 - len(steps)} of 50 sheets of pictures are left out: raise --megabytes to see them"
    ]
    with pytest.raises(UserError, match="--megabytes=0.01: the curves alone are"):
        report.page(found, 10**4)


def test_thinning_keeps_spikes_gaps_and_ends():
    values = {step: float(step % 7) for step in range(10_000)} | {5000: 1e9, 9999: -3.0}
    values |= dict.fromkeys(range(200, 400), float("nan"))
    found = report.thinned(values, 100)
    assert len(found) <= 102 and (5000, 1e9) in found and found[-1] == (9999, -3.0)
    assert any(value is None for _, value in found) and found == sorted(found, key=lambda x: x[0])
    assert report.thinned({2: 1.23456789, 1: 0.0}, 100) == [(1, 0.0), (2, 1.23457)]


def test_chromium_shows_curves_slider_pictures_and_the_configs_difference(two, tmp_path):
    content, _ = report.page(two, 10**6)
    (tmp_path / "page.html").write_bytes(content)
    with opened() as page:
        page.goto(f"file://{tmp_path}/page.html")
        titles = page.locator(".chart h3").all_inner_texts()
        for title in "loss", "held-out loss at noise level 0.9", "images/s", "MFU":
            assert title in titles
        loss = page.locator(".chart").first.locator("path.curve")
        assert loss.count() == 2  # runs; the gap at step 12 begins a line anew
        assert [loss.nth(i).get_attribute("d").count("M") for i in range(2)] == [2, 2]
        nothing = page.locator(".chart", has_text="idle").locator("text").all_text_contents()
        assert nothing[0] == "0" and not [text for text in nothing if text.startswith("-")]
        page.locator("#smooth").fill("0.5")
        page.locator("#log").check()
        assert page.locator(".chart").first.locator("path.raw").count() == 2
        page.locator(".chart svg").first.hover()
        assert "base" in page.locator(".tip").first.inner_text()

        captions = page.locator("#pictures figcaption")
        assert captions.all_inner_texts() == [" base, samples, step 24", " lr=2, samples, step 16"]
        sources = set()
        for position, step in (0, 8), (1, 16), (2, 24):
            page.locator("#step").fill(str(position))
            assert page.inner_text("#moment") == f"step {step}"
            image = page.locator("#pictures img").first
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
            sources.add(image.get_attribute("src"))
        assert len(sources) == 3

        keys = page.locator("#config td.key")
        assert keys.all_inner_texts() == ["recipe.rate"]
        assert page.locator("#config td.value").all_inner_texts() == ["0.001", "2.0"]
        page.locator("#all").check()
        assert keys.count() == 3 and page.locator("#config td.differs").count() == 2
        page.locator("#key").fill("steps")
        assert keys.all_inner_texts() == ["recipe.steps"]

        page.locator("#runs input").nth(1).uncheck()
        assert (
            captions.count() == 1
            and page.locator(".chart").first.locator("path.curve").count() == 1
        )
        assert "cannot be shown" in page.inner_text("#incidents")
        page.locator("#pictures summary").click()
        assert page.locator(".prompts li").first.inner_text().startswith("</script><img src=x")
        assert page.title() == "Report: 2 runs"
        assert [url for url in page.requests if not url.startswith("data:")] == [page.url]
