"""The report in a real browser: it fits a phone, loads nothing, and what a model wrote runs nowhere."""

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from evaluation.compared_report import write_comparison
from tests.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(full_run: Path) -> str:
    return (full_run / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def compared(full_run: Path, make_run: Callable[..., Path]) -> Path:
    """A comparison of two runs."""
    return write_comparison([full_run, make_run(name="one-of-a-longer-name", lift=0.5)], full_run / "compared.html")


@pytest.fixture(
    params=[
        ("full_run", "made-up", 14),
        ("strength_run", "measured", 13),
        ("reward_run", "fitted", 7),
        ("compared", "made-up and one-of-a-longer-name", 7),
    ],
    ids=lambda p: p[0],
)
def shown(request: pytest.FixtureRequest) -> tuple[str, str, int]:
    """A page, its run's name, and how many figures it has."""
    fixture, name, figures = request.param
    page = request.getfixturevalue(fixture)
    return (page if page.is_file() else page / "report.html").read_text("utf-8"), name, figures


@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_and_stays_quiet(browser: Browser, tmp_path: Path, shown: tuple[str, str, int], width: int) -> None:
    page, name, figures = shown
    seen = browser.measure(tmp_path / "page.html", page, width)
    scripts = 1 if name == "made-up" else 0  # that which searches a run's samples
    assert seen["title"] == f"{name} · Rondo"  # not what the <script> in a response would make of it
    assert seen["overflow"] == 0
    assert (seen["scripts"], seen["loaded"], seen["console"]) == (scripts, 0, 0)
    assert seen["shown"] == figures  # one variant of each
    assert float(seen["smallest"]) >= 9  # pixels; the text of a figure stays legible


def test_the_measure_sees_an_overflow_a_script_and_an_error(browser: Browser, tmp_path: Path, page: str) -> None:
    """The test of the test: a page that is too wide, runs a script and has an error is caught."""
    spoilt = page.replace("<h2>Rounds</h2>", '<h2 style="width:900px">Rounds</h2>').replace("default-src 'none';", "")
    spoilt = spoilt.replace("</body>", "<script>document.title='owned'; console.error('oh')</script></body>")
    seen = browser.measure(tmp_path / "page.html", re.sub(r"script-src 'sha256-[^']*';", "", spoilt), 390)
    assert float(seen["overflow"]) > 0
    assert (seen["title"], seen["scripts"], seen["console"]) == ("owned", 2, 1)


def test_a_script_that_is_not_the_pages_own_is_refused(browser: Browser, tmp_path: Path, page: str) -> None:
    spoilt = page.replace("</body>", "<script>document.title='owned'</script></body>")
    seen = browser.measure(tmp_path / "page.html", spoilt, 390)
    assert (seen["title"], seen["scripts"], seen["console"]) == ("made-up · Rondo", 2, 1)  # and the browser says so


def test_text_stands_out_in_both_themes(page: str) -> None:
    """WCAG's contrast of text: 4.5 and more on every ground that it stands on."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    roots = re.findall(r":root \{(.*?)\n *\}", page, re.DOTALL)
    assert len(roots) == 2  # light, then dark
    for root in roots:
        found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", root))
        for text, ground in (*product(("ink", "muted"), ("page", "card", "tint")), ("good", "good-bg"), ("warn", "warn-bg")):
            low, high = sorted((luminance(found[text]), luminance(found[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 1600)])
def test_screenshots_of_a_phone_and_a_desk_show_both_themes(
    browser: Browser, tmp_path: Path, full_run: Path, width: int, height: int
) -> None:
    browser.open((full_run / "report.html").resolve().as_uri())
    shades = []
    for dark in (False, True):
        shot = tmp_path / f"{dark}.png"
        browser.look(shot, dark, width, height)
        with Image.open(shot) as image:
            assert image.size == (width, height)
            shades.append(image.convert("L").getpixel((4, 4)))
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 200
    assert shades[0] > 200
    assert shades[1] < 60
