"""The pages in a real headless Chromium: search, filters, order, address, widths, dark mode, keyboard."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paper_room import CLEAN, add_arms, add_curves, add_record, claim, write_paper

from scripts import leaderboard, recipes
from scripts.external import External
from scripts.maps import Cell, EffectMap

pytestmark = pytest.mark.browser

CLAIMS = (
    claim(),
    claim(id="fails", text="The control beats the method", treatment="mini-ce.yaml", control="mini.yaml"),
    claim(id="near", text="The metric exceeds a threshold", control=None, threshold=0.80, margin=0.01),
    claim(id="full", text="The same at full scale", scale="paper", treatment="full.yaml", seeds=[0, 1]),
)

RATIOS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 3.0)


def effect_map() -> EffectMap:
    """A map with every colour, a cell whose seeds disagree, one that diverged; stale, as its grid is nowhere."""
    values = [(ratio, ratio) for ratio in RATIOS] + [(0.2, 1.9), (0.2, float("nan"))]
    return EffectMap(
        paper="toy",
        title="FD of the method minus FD of the control",
        metric="fd/nfe{nfe}",
        command="noisebench effect-map toy --seeds 0..1",
        steps=None,
        seeds=[0, 1],
        rows={"flow": {"treatment": "mini", "control": "mini-ce"}},
        batches=[8, 16, 32],
        nfes=[2, 5, 20],
        grid_hash="0123456789ab",
        recipes={},
        git=[CLEAN],
        cpu_seconds=120.0,
        finished_at="2026-01-01T00:00:00+00:00",
        cells=[
            Cell("flow", batch, nfe, tuple(95 * value for value in values[3 * y + x]), (95.0, 95.0))
            for y, batch in enumerate((8, 16, 32))
            for x, nfe in enumerate((2, 5, 20))
        ],
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two papers: one with all four verdicts, one that nobody ran; a broken record, a reported number."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "ROOT", folder / "recipes")
        write_paper(recipes.ROOT, *CLAIMS)
        write_paper(recipes.ROOT, slug="other", family="others")
        runs = folder / "runs"
        add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
        for recipe, values in (("mini", (0.80, 0.82, 0.81)), ("mini-ce", (0.50, 0.51, 0.53))):
            for seed, value in enumerate(values):
                record = add_record(runs, recipe, seed, value, git=CLEAN, command=f"noisebench fit {'x' * 300}")
                add_curves(record, **{"test/acc": [0.1, 0.4, value], "wrong/memorized": [0.0, 0.1, 0.2]})
        broken = add_record(runs, "mini", 7, 0.8)
        broken.write_text("{")
        reported = External("toy", "beats", None, "test/acc_last", 0.9, 0.7, "Smith 2021", "https://example.org")
        board = dataclasses.replace(leaderboard.board_of_runs(runs), reported=[reported], maps=[effect_map()])
        leaderboard.write_pages(board, folder / "pages", "--runs")
    return folder / "pages"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        pytest.fail("needs chromium and chromedriver on the PATH: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def index(chromium: Any, site: Path) -> Any:
    """The index, freshly opened at 1280 pixels."""
    return opened(chromium, site / "index.html")


def opened(chromium: Any, file: Path, hash_: str = "", width: int = 1280, scheme: str = "light") -> Any:
    chromium.get("about:blank")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    chromium.get_log("browser")
    chromium.get(file.as_uri() + hash_)
    return chromium


def shown(chromium: Any) -> list[str]:
    """Ids of the claims that are visible, in order."""
    script = "return [...document.querySelectorAll('#claims tbody tr')].filter(r => r.checkVisibility())"
    return chromium.execute_script(script + ".map(r => r.querySelector('.mono').textContent)")


def choose(chromium: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(chromium.find_element("name", name)).select_by_visible_text(value)


def head(chromium: Any, key: str) -> Any:
    return chromium.find_element("css selector", f"th[data-key={key}] button")


@pytest.mark.parametrize("name", ["index.html", "toy.html", "other.html", "effect_map.html"])
def test_nothing_in_the_console(chromium: Any, site: Path, name: str) -> None:
    opened(chromium, site / name)
    assert chromium.get_log("browser") == []


def test_all_claims_are_shown_and_counted(index: Any) -> None:
    assert shown(index) == ["beats", "beats", "fails", "near", "full"]
    assert index.find_element("id", "count").text == "5 of 5 claims shown"


def test_search_takes_every_word(index: Any) -> None:
    index.find_element("name", "q").send_keys("METHOD control beats fails")
    assert shown(index) == ["fails"]
    assert index.find_element("id", "count").text == "1 of 5 claims shown"


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("verdict", "not reproduced", ["fails"]),
        ("verdict", "inconclusive", ["near"]),
        ("verdict", "not run", ["beats", "full"]),
        ("scale", "paper", ["full"]),
        ("family", "others", ["beats"]),
        ("paper", "toy", ["beats", "fails", "near", "full"]),
    ],
)
def test_filter(index: Any, name: str, value: str, left: list[str]) -> None:
    choose(index, name, value)
    assert shown(index) == left


def test_filters_add_up_and_reset_shows_all(index: Any) -> None:
    choose(index, "paper", "toy")
    choose(index, "verdict", "not run")
    assert shown(index) == ["full"]
    index.find_element("css selector", "button[type=reset]").click()
    assert len(shown(index)) == 5
    assert "#" not in index.current_url


def test_sort_by_number_both_ways_with_empty_cells_last(index: Any) -> None:
    head(index, "effect").click()
    assert shown(index)[:3] == ["fails", "near", "beats"]
    head(index, "effect").click()
    assert shown(index)[:3] == ["beats", "near", "fails"]
    assert head(index, "effect").find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    head(index, "scale").click()
    sorted_heads = index.find_elements("css selector", "[aria-sort]")
    assert [found.get_attribute("data-key") for found in sorted_heads] == ["scale"]


def test_address_holds_the_state_and_restores_it(index: Any, site: Path) -> None:
    choose(index, "paper", "toy")
    index.find_element("name", "q").send_keys("beats")
    head(index, "effect").click()
    head(index, "effect").click()
    state = "#" + index.current_url.partition("#")[2]
    assert state == "#q=beats&paper=toy&sort=-effect"
    opened(index, site / "index.html", state)
    assert shown(index) == ["beats", "fails"]
    assert index.find_element("name", "q").get_attribute("value") == "beats"


@pytest.mark.parametrize("state", ["#sort=nonsense&verdict=none&q=", "#%E0%A4%A", "#=&=&&", "#effects"])
def test_odd_address_shows_all(chromium: Any, site: Path, state: str) -> None:
    opened(chromium, site / "index.html", state)
    assert len(shown(chromium)) == 5
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index.html", "toy.html", "other.html", "effect_map.html"])
def test_page_never_scrolls_sideways(chromium: Any, site: Path, name: str, width: int) -> None:
    opened(chromium, site / name, width=width)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    root = chromium.execute_script(
        "const e = document.documentElement; return [innerWidth, e.scrollWidth - e.clientWidth]"
    )
    assert root == [width, 0]


def test_whole_table_fits_at_1280(index: Any) -> None:
    script = "const box = document.getElementById('claims').parentElement; return box.scrollWidth - box.clientWidth"
    assert index.execute_script(script) == 0


def test_map_fits_a_telephone(chromium: Any, site: Path) -> None:
    opened(chromium, site / "effect_map.html", width=390)
    script = "const box = document.querySelector('.map').parentElement; return box.scrollWidth - box.clientWidth"
    assert chromium.execute_script(script) == 0


def luminance(channels: list[float]) -> float:
    """WCAG 2 relative luminance of an sRGB colour, 0 to 255 each."""
    linear = [c / 255 / 12.92 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "toy.html", "effect_map.html"])
def test_text_has_contrast_aa(chromium: Any, site: Path, name: str, scheme: str) -> None:
    opened(chromium, site / name, scheme=scheme)
    script = """
      const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const found = {};
      for (const e of document.querySelectorAll('main *, header *, footer *')) {
        if (e.tagName === 'title' || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        let up = e;
        while (up && getComputedStyle(up).backgroundColor === 'rgba(0, 0, 0, 0)') up = up.parentElement;
        const colour = e.tagName === 'text' ? getComputedStyle(e).fill : getComputedStyle(e).color;
        found[colour + getComputedStyle(up).backgroundColor] =
          [rgb(colour), rgb(getComputedStyle(up).backgroundColor), e.tagName + '.' + e.getAttribute('class')];
      }
      return [rgb(getComputedStyle(document.body).backgroundColor), Object.values(found)];
    """
    background, pairs = chromium.execute_script(script)
    assert (luminance(background) < 0.05) == (scheme == "dark")
    for text, behind, where in pairs:
        low, high = sorted((luminance(text), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, where


def test_sort_and_filter_by_keyboard_alone(index: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> str:
        ActionChains(index).send_keys(key).perform()
        return index.execute_script("return document.activeElement.textContent")

    assert press(Keys.TAB) == "Skip to the content"
    reached = [press(Keys.TAB) for _ in range(7)]
    assert "Show all" in reached
    while index.execute_script("return document.activeElement.parentElement.dataset.key") != "effect":
        reached.append(press(Keys.TAB))
        assert len(reached) < 40
    style = "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
    assert index.execute_script(style) == "solid3px"
    press(Keys.ENTER)
    assert shown(index)[0] == "fails"
    press(Keys.SPACE)
    assert shown(index)[0] == "beats"


def test_link_of_a_claim_leads_to_its_section(index: Any) -> None:
    index.find_element("link text", "The control beats the method").click()
    assert index.current_url.endswith("/toy.html#claim-fails")
    assert index.execute_script("return document.querySelector(':target h2').textContent") == (
        "The control beats the method"
    )


def test_page_reads_without_scripts(chromium: Any, site: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(chromium, site / "index.html")
        assert not chromium.find_element("id", "controls").is_displayed()
        assert len(chromium.find_elements("css selector", "#claims tbody tr")) == 5
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
