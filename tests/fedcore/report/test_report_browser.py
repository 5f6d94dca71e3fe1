"""Reports opened in a real browser: what a person would see at desk and at pocket size."""
import re
import shutil
import struct
import subprocess
import zlib

import pytest

from fedcore.report import write_comparison, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, NARROW = 1400, 400

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"), pytest.mark.slow]

MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, seen = [...document.querySelectorAll("main *")];
  const inScroll = e => e.closest(".scroll, svg, #tip") || getComputedStyle(e).display === "none";
  const wide = seen.filter(e => !inScroll(e) && e.getBoundingClientRect().right > innerWidth + 1);
  const tiny = seen.filter(e => !e.closest("svg") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
                                && parseFloat(getComputedStyle(e).fontSize) < 9.5 && e.tagName !== "SCRIPT");
  const flat = [...document.querySelectorAll("figure svg")].filter(e => e.getBoundingClientRect().height < 8);
  root.dataset.measured = [innerWidth, root.scrollWidth, wide.length, tiny.length, flat.length].join(" ");
});</script></body>"""


def chromium(profile, path, width, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
               f"--user-data-dir={profile}", f"--window-size={width},2400", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


def pixels_of(png: bytes) -> tuple[int, int, int]:
    """Return width, height and the number of different bytes in a PNG's image data: few in an empty picture."""
    width, height = struct.unpack(">II", png[16:24])
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at:at + 8])
        data += png[at + 8:at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return width, height, len(set(zlib.decompress(data)))


@pytest.fixture(params=["report", "hostile", "crowd", "comparison"])
def page(request, made_up_run, tmp_path):
    """An HTML file of each kind that a user may open."""
    if request.param == "report":
        return write_report(made_up_run())
    if request.param == "hostile":
        return write_report(made_up_run(failing=(("failure", "<script>alert(1)</script>" + "x" * 500),), nan_from=50.0,
                                        figures={"epsilon": 0.1}, settings={"a_long_setting": "y" * 300}))
    if request.param == "crowd":
        return write_report(made_up_run(clients=120, strategy="fedasync", seconds=60.0, labels=80))
    return write_comparison([made_up_run("c"), made_up_run("a", strategy="fedavg"),
                             made_up_run("b", strategy="fedavg", local_steps=5)], tmp_path)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_sticks_out_and_all_text_is_legible(page, width, tmp_path):
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    dom = chromium(tmp_path / "profile", measured, width, "--dump-dom")
    inner, scroll, wide, tiny, flat = map(int, re.search(r'data-measured="([\d ]+)"', dom)[1].split())
    assert scroll <= inner <= max(width, 500)       # some builds keep windows at 500 pixels or more
    assert (wide, tiny, flat) == (0, 0, 0)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_picture_of_the_page_shows_something(made_up_run, width, tmp_path):
    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", write_report(made_up_run()), width, f"--screenshot={picture}")
    shot_width, shot_height, values = pixels_of(picture.read_bytes())
    assert (shot_width, shot_height) == (width, 2400)
    assert values > 100
    assert picture.stat().st_size > 40_000


POINT = """<script>addEventListener("load", () => {
  const said = selector => {
    const area = document.querySelector(selector), box = area.getBoundingClientRect();
    const at = {clientX: box.left + box.width * 0.5, clientY: box.top + box.height * 0.05 + 4, bubbles: true};
    area.dispatchEvent(new PointerEvent("pointermove", at));
    return document.querySelector("#tip").textContent;
  };
  document.title = said(".area[data-hover]") + " | " + said(".area[data-window]");
});</script></body>"""


def test_the_pointer_is_answered_with_exact_values(made_up_run, tmp_path):
    pointed = tmp_path / "pointed.html"
    html = write_report(made_up_run()).read_text(encoding="utf-8")
    pointed.write_text(html.replace("</body>", POINT), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", chromium(tmp_path / "profile", pointed, WIDE, "--dump-dom"))[1]
    assert re.fullmatch(r"[\d.]+ % at [\d.]+ s \| client 0, [\d.]+ to [\d.]+ s: training, \d+ steps, group \d+, "
                        r"staleness \d+", title)
