"""The page of a recorded run in a browser: nothing is fetched, nothing is wider than a phone, and what is shown under
the pointer and at the slider is what the Parquet files and `hf-gradclip replay` say."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from hf_gradclip.analysis.report import write_report
from hf_gradclip.cli import main
from hf_gradclip.record.files import FOLDER
from tests.analysis.records import norms_of, record_by_hand, recorded, save

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A recorded run of 300 steps, with a NaN in step 34."""
    folder = tmp_path_factory.mktemp("run")
    recorded("zclip:warmup_steps=10", folder, norms_of(300), loss=3.0)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no Chromium on this machine: install it, or leave out -m browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def parquet_rows(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The rows of a record as its file holds them, by step, and the names of its tensors."""
    (path,) = (folder / FOLDER).glob("gradient-*.parquet")
    names = json.loads(parquet.read_schema(path).metadata[b"hf_gradclip"])["names"]
    return {row["step"]: row for row in parquet.read_table(path).to_pylist()}, names


def point(page: Any, kind: str, step: int, y: float = 0.5) -> str:
    """Move the pointer to a step in a picture, at a part of its height from above; what is said there."""
    box, (first, last) = page.evaluate(
        """kind => {
            const figure = document.querySelector(`figure[data-kind="${kind}"]`);
            figure.scrollIntoView({block: "center"});
            const svg = [...figure.querySelectorAll("svg")].find(svg => svg.getClientRects().length);
            const place = svg.getBoundingClientRect(), scale = place.width / svg.viewBox.baseVal.width;
            const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
            return [[place.x + left * scale, place.y + top * scale, (right - left) * scale, (bottom - top) * scale],
                    svg.dataset.x.split(" ").map(Number)];
        }""",
        kind,
    )
    page.mouse.move(box[0] + (step - first) / (last - first) * box[2], box[1] + y * box[3])
    return str(page.inner_text(f'figure[data-kind="{kind}"] .values'))


def assert_cell(said: str, rows: dict[int, dict[str, Any]], names: list[str], place: int) -> None:
    """What is said of a cell of the heat map is the largest finite norm of the tensor in those steps."""
    first, last, name, words = re.fullmatch(r"steps? (\d+)(?: to (\d+))?, (.*?): (.*)", said).groups()
    assert name == names[place]
    norms = np.array([rows[step]["norms"][place] for step in range(int(first), int(last or first) + 1)])
    found = re.match(r"norm ([-+.e\d]+)", words)
    assert (float(found[1]) if found else 0.0) == pytest.approx(np.nan_to_num(norms).max(), rel=1e-3)
    assert words.endswith("NaN or inf") == bool(np.isnan(norms).any())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page(browser, run, width, scheme) -> None:
    page_file, *pictures = write_report([run])
    errors: list[str] = []
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    shown = page.evaluate(
        "[...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length)"
        ".map(svg => [svg.clientWidth, svg.viewBox.baseVal.width])"
    )
    whole = page.evaluate("document.documentElement.scrollWidth")
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    said = page.inner_text("ul.findings")
    page.close()
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert len(shown) == len(pictures) >= 6
    assert all(size > 0.85 * min(width, 900) for size, _ in shown)
    assert shown[0][1] == pytest.approx(331.2 if width == 390 else 648), "a phone gets the narrow drawing"
    assert whole <= width
    lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink)]
    assert (lightness[0] > 600 > 150 > lightness[1]) if scheme == "light" else (lightness[0] < 150 < 600 < lightness[1])
    assert "clipped in" in said


@pytest.mark.parametrize("width", [1280, 390])
def test_the_pointer_says_what_the_files_hold(browser, run, width) -> None:
    rows, names = parquet_rows(run)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report([run])[0].as_uri())
    seen = set()
    for wanted in (5, 61, 91, 150, 222, 300):
        said = point(page, "norm", wanted)
        step = int(re.match(r"step (\d+):", said)[1])
        assert abs(step - wanted) <= (0 if width == 1280 else 1)
        found = {name: float(number) for name, number in re.findall(r"(norm|threshold|scale) ([-+.e\d]+)", said)}
        row = rows[step]
        norms, scales = np.array(row["norms"], float), np.array(row["scales"], float)
        assert found["norm"] == pytest.approx(row["norm"], rel=1e-4)
        assert ("threshold" in found) == np.isfinite(row["threshold"])
        assert found.get("threshold", np.nan) == pytest.approx(row["threshold"], rel=1e-4, nan_ok=True)
        left = np.sqrt(((norms * scales) ** 2).sum() / (norms**2).sum())
        assert found["scale"] == pytest.approx(left, rel=1e-4)
        assert ("clipped" in said) == bool((scales < 1).any())
        seen |= {"clipped" in said}
        said = point(page, "loss", step)
        assert float(re.search(r"loss ([.\d]+)", said)[1]) == pytest.approx(row["loss"], rel=1e-4)
        said = point(page, "learning_rate", step)
        assert float(re.search(r"rate ([.\d]+)", said)[1]) == pytest.approx(row["learning_rate"], rel=1e-4)
        for place in range(len(names)):
            assert_cell(point(page, "heat", step, (place + 0.5) / len(names)), rows, names, place)
    assert seen == {True, False}
    (broken,) = np.flatnonzero(np.isnan(rows[34]["norms"])).tolist()
    said = point(page, "norm", 34)
    assert said.startswith("step 34:")
    assert said.endswith("NaN or inf, left out")
    for place in range(len(names)):
        said = point(page, "heat", 34, (place + 0.5) / len(names))
        assert_cell(said, rows, names, place)
        assert ("NaN or inf" in said) == (place == broken)
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_bin_of_the_heat_map_is_seen(browser, tmp_path, width) -> None:
    """A NaN of one step in a run of 3,000: wherever it is, some dots of its row are red."""
    norms = norms_of(3000)
    places = [17, 900, 1501, 2222, 2999]
    norms[places, 1] = np.nan
    save(record_by_hand(norms), tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report([tmp_path], tmp_path / "x.html")[0].as_uri())
    image = page.locator('figure[data-kind="heat"] svg image:visible').first.screenshot()
    page.close()
    dots = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    line = dots[int(dots.shape[0] * 1.5 / 4)]
    red = (line[:, 0] > 200) & (line[:, 1] < 60)
    assert ((red[1:] & ~red[:-1]).sum() + red[0]) == len(places)


def test_the_slider_says_what_a_replay_says(browser, run, capsys, monkeypatch) -> None:
    """At its ends, its beginning and between, word for word; the dashed line lies where the threshold is."""
    monkeypatch.setenv("COLUMNS", "200")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(write_report([run])[0].as_uri())
    slider = page.locator("input[type=range]")
    rates = set()
    last = int(slider.get_attribute("max"))
    for place in (int(slider.input_value()), 0, last // 3, last // 2, last - 3, last):
        slider.evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(place)
        )
        cells = page.locator("tr.chosen td").all_inner_texts()
        capsys.readouterr()
        assert main(["replay", str(run), "--clip", cells[0]]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(cells[0]))
        assert re.split(r"\s{2,}", line.strip()) == cells
        rates.add(cells[1])
        y, box, ends = page.evaluate(
            """[...document.querySelectorAll('figure[data-kind="norm"] .wide svg')].map(svg =>
                [Number(svg.querySelector(".limit").getAttribute("y1")),
                 svg.dataset.box.split(" ").map(Number), svg.dataset.y.split(" ").map(Number)])[0]"""
        )
        limit = np.clip(float(cells[0].partition("=")[2]), *ends)
        share = np.log(limit / ends[0]) / np.log(ends[1] / ends[0])
        assert y == pytest.approx(box[3] - share * (box[3] - box[1]), abs=0.01)
    assert len(rates) >= 5
    rows = page.locator("section table tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows[:-1]] == ["as recorded", "adaptive_norm", "zclip", "adagc"]
    for row in rows[1:-1]:
        name = row.split("\t")[0]
        assert main(["replay", str(run), "--clip", name]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
        assert re.split(r"\s{2,}", line.strip()) == row.split("\t")
    page.close()
