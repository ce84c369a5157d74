"""How a real browser shows the pages, what a validator finds in them, and whether all can read them.

Run with what is here: playwright and Chromium, Java and npm's vnu-jar, npm's axe-core. `make test-pages` fetches the
npm packages, into .pages.
"""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit.results.page.compared import comparison
from sparsekit.results.page.html import page
from tests.test_page import LINEARS, METRICS, board, example

PACKAGES = Path(__file__).parents[1] / ".pages" / "node_modules"
PAGES = {"report": lambda: page(example(), METRICS), "compared": lambda: comparison(*board())}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: the system's, or the one that playwright has fetched."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with driver.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium here: install it with the system's packages or `playwright install`")
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        launched = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync", "--no-first-run"])
        yield launched
        launched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    report = example()
    many = copy.deepcopy(LINEARS)
    many += [f"model.layers.0.mlp.experts.{expert}.{part}" for expert in range(16) for part in ("up", "gate", "down")]
    report["error"] = dict.fromkeys(many, 0.01)  # more columns than fit: they scroll inside their frame
    report["samples"][0]["pruned"] = "endless" * 100
    file = tmp_path / "report.html"
    file.write_text(page(report, METRICS), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    headline = tab.locator("h1")
    assert headline.is_visible() and "some/model" in headline.inner_text()
    assert tab.locator(".headline dd").first.is_visible()
    box = headline.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] < 200
    smallest = (
        "Math.min(...[...document.querySelectorAll('body *')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert tab.evaluate(smallest) >= 9
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(ground) > 600) == (scheme == "light")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_all_can_read_it(browser: Any, tmp_path: Path, name: str, scheme: str) -> None:
    """axe-core finds nothing serious: contrast, names of drawings and tables, order of headings, keyboard."""
    axe = PACKAGES / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("axe-core is not here: make test-pages")
    file = tmp_path / "page.html"
    file.write_text(PAGES[name](), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(file.as_uri())
    tab.add_script_tag(path=str(axe))
    found = tab.evaluate("axe.run()")
    context.close()
    assert len(found["passes"]) > 10  # it did look
    said = [(each["id"], each["help"], each["nodes"][0]["html"][:200]) for each in found["violations"]]
    assert said == []


@pytest.mark.parametrize("name", PAGES)
def test_a_validator_finds_it_sound(tmp_path: Path, name: str) -> None:
    """The Nu Html Checker of the W3C, which checks the style sheet too."""
    jar = PACKAGES / "vnu-jar" / "build" / "dist" / "vnu.jar"
    if not (jar.is_file() and shutil.which("java")):
        pytest.skip("vnu-jar or Java is not here: make test-pages")
    file = tmp_path / "page.html"
    file.write_text(PAGES[name](), encoding="utf-8")
    unknown_to_it = ".*.var\\(--v\\). is not a .*"  # a share inside color-mix, which browsers read
    command = ["java", "-jar", str(jar), "--format", "gnu", "--filterpattern", unknown_to_it, str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize("name", PAGES)
def test_it_is_light(name: str) -> None:
    assert len(PAGES[name]().encode()) < 200_000
