"""The report in a real browser: it fits a phone, loads nothing, and what a model wrote runs nowhere."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from evaluation.compared_report import write_comparison

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)")

# The page in a frame as wide as a phone, and a script outside of it that writes down what it measures.
FRAME = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
document.getElementById("frame").addEventListener("load", (event) => {{
  const inner = event.target.contentDocument, view = event.target.contentWindow;
  document.title = JSON.stringify({{
    title: inner.title,
    overflow: inner.documentElement.scrollWidth - inner.documentElement.clientWidth,
    scripts: inner.scripts.length,
    loaded: view.performance.getEntriesByType("resource").length,
    shown: [...inner.querySelectorAll("figure svg")].filter((svg) => svg.getBoundingClientRect().width > 0).length,
    smallest: Math.min(...[...inner.querySelectorAll("figure svg text")]
      .map((text) => text.getBoundingClientRect().height).filter((height) => height)),
  }});
}});
</script>"""


def browse(tmp_path: Path, url: Path, width: int, height: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium once, without a window and without the network; what it wrote."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}",
        *more, url.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def measure(tmp_path: Path, page: str, width: int, *more: str) -> dict[str, str | float]:
    """What the page is like in a frame of this width."""
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, height=1200, page=html.escape(page)), "utf-8")
    done = browse(tmp_path, frame, 1500, 1300, "--dump-dom", "--enable-logging=stderr", *more)
    title = html.unescape(done.stdout.split("<title>", 1)[1].split("</title>", 1)[0])
    result: dict[str, str | float] = json.loads(title)
    return result | {"console": done.stderr.count(":CONSOLE")}


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
def test_it_fits_and_stays_quiet(tmp_path: Path, shown: tuple[str, str, int], width: int) -> None:
    page, name, figures = shown
    seen = measure(tmp_path, page, width)
    scripts = 1 if name == "made-up" else 0  # that which searches a run's samples
    assert seen["title"] == f"{name} · Rondo"  # not what the <script> in a response would make of it
    assert seen["overflow"] == 0
    assert (seen["scripts"], seen["loaded"], seen["console"]) == (scripts, 0, 0)
    assert seen["shown"] == figures  # one variant of each
    assert float(seen["smallest"]) >= 9  # pixels; the text of a figure stays legible


def test_the_measure_sees_an_overflow_a_script_and_an_error(tmp_path: Path, page: str) -> None:
    """The test of the test: a page that is too wide, runs a script and has an error is caught."""
    spoilt = page.replace("<h2>Rounds</h2>", '<h2 style="width:900px">Rounds</h2>').replace("default-src 'none';", "")
    spoilt = spoilt.replace("</body>", "<script>document.title='owned'; console.error('oh')</script></body>")
    seen = measure(tmp_path, re.sub(r"script-src 'sha256-[^']*';", "", spoilt), 390)
    assert float(seen["overflow"]) > 0
    assert (seen["title"], seen["scripts"], seen["console"]) == ("owned", 2, 1)


def test_a_script_that_is_not_the_pages_own_is_refused(tmp_path: Path, page: str) -> None:
    spoilt = page.replace("</body>", "<script>document.title='owned'</script></body>")
    seen = measure(tmp_path, spoilt, 390)
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


def test_light_and_dark_screenshots_differ_and_show_something(tmp_path: Path, full_run: Path) -> None:
    shades = []
    for name, setting in (("light", "preferredColorScheme=1"), ("dark", "preferredColorScheme=0")):
        shot = tmp_path / f"{name}.png"
        browse(tmp_path, full_run / "report.html", 1280, 1600, f"--screenshot={shot}", f"--blink-settings={setting}")
        with Image.open(shot) as image:
            assert image.size == (1280, 1600)
            grey = image.convert("L")
            shades.append(grey.getpixel((4, 4)))
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 200
    assert shades[0] > 200
    assert shades[1] < 60
