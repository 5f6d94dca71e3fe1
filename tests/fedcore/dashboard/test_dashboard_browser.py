"""The live page in a real browser, at desk and at pocket size."""
import pytest

from fedcore.dashboard import serve_dashboard
from tests.fedcore.dashboard.browser import CHROMIUM, Browser
from tests.fedcore.dashboard.conftest import link, node, rows_of_a_run

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"), pytest.mark.slow]

FITS = """(() => {
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg")
    && e.getBoundingClientRect().right > innerWidth + 1);
  return [innerWidth, document.documentElement.scrollWidth, wide.length];
})()"""
POINT = """(() => {
  const area = document.querySelector("#learning .area[data-hover]"), box = area.getBoundingClientRect();
  area.dispatchEvent(new PointerEvent("pointermove",
    {clientX: box.left + box.width * 0.5, clientY: box.top + 10, bubbles: true}));
  return document.querySelector("#tip").textContent;
})()"""


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_follows_the_run_and_nothing_sticks_out(run_folder, tmp_path, width):
    nodes = [node(0), node(1, doing="idle"), node(2, connected=False, away_s=3.0, name="<img src=x onerror=alert(1)>")]
    metrics, tasks = rows_of_a_run()
    with serve_dashboard(lambda: link(*nodes), run_folder, 0) as dashboard, \
            Browser(tmp_path / "profile", dashboard.url, width) as browser:
        browser.wait_for("document.querySelector('#link')?.textContent === 'connected'")
        assert browser.see("document.querySelectorAll('#learning figure').length") == 0
        for row in metrics:
            dashboard.on_row(row)
        for row in tasks:
            dashboard.on_task(row)
        nodes.append(node(3, name="late-comer"))
        browser.wait_for("document.querySelectorAll('#learning figure').length === 2")
        browser.wait_for("document.querySelector('#clients').textContent.includes('late-comer')")
        assert browser.see("document.title") == "fedbuff on digits"
        assert browser.see("document.querySelectorAll('img').length") == 0
        inner, scroll, wide = browser.see(FITS)
        assert (inner, scroll <= inner, wide) == (width, True, 0)
        assert " at " in browser.see(POINT)     # curves that came later answer the pointer too
        assert len(browser.picture(tmp_path / "page.png")) > 30_000
        dashboard.close()
        browser.wait_for("document.querySelector('#link').textContent === 'the run is over'")


def test_a_server_that_dies_is_noticed(run_folder, tmp_path):
    with serve_dashboard(lambda: link(node(0)), run_folder, 0) as dashboard, \
            Browser(tmp_path / "profile", dashboard.url, 800) as browser:
        browser.wait_for("document.querySelector('#link')?.textContent === 'connected'")
        dashboard._snapshot = None      # whoever asks for news now gets an exception instead, and no end
        browser.wait_for("document.querySelector('#link').className === 'lost'")
