"""The page in a real Chromium: no complaint, no network, by keyboard alone, on a phone's width."""

import itertools
import re
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("plotly")

from chromium import chromium
from html_page import PAYLOAD, Page, hostile_run

from kepo.report.command import ReportFlags, write_report

ENTER, TAB, SPACE, RIGHT = "\ue007", "\ue004", " ", "\ue014"
SHOWN = "[...document.querySelectorAll('.item')]"


@pytest.fixture(scope="module")
def tab():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(tab, page_file):
    tab.open(page_file)
    return tab


@pytest.fixture(scope="module")
def items(page_file):
    return Page(page_file).completions


def focus(tab, selector):
    tab.js(f'document.querySelector("{selector}").focus()')


def test_it_draws_every_curve_without_complaint_and_without_a_network(opened, page_file):
    page = Page(page_file)
    assert opened.complaints() == []
    assert opened.requests() == [page_file.as_uri()]
    curves = sum(len(panel["series"]) for panel in page.data["curves"]["main"])
    lines = "document.querySelectorAll('#panels .scatterlayer .trace').length"
    assert curves <= opened.js(lines) <= 2 * curves  # each smoothed, and faintly as it is
    assert opened.js("document.querySelectorAll('#accuracy .main-svg').length") >= 2
    assert opened.js("document.querySelectorAll('[data-memory] .bars .point').length") > 5


def test_a_script_of_another_is_refused(opened):
    """The policy, not only the escaping, keeps text from becoming a script."""
    opened.js(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.hacked = 1'}))"
    )
    image = '<img src=https://example.invalid/a.png onerror="window.hacked = 2">'
    opened.js(f"document.body.insertAdjacentHTML('beforeend', '{image}')")
    opened.wait("document.querySelector('img[src^=https]').complete")
    assert opened.js("window.hacked") is None
    assert any("Content Security Policy" in words for words in opened.complaints())


def counted(tab):
    return tab.js("document.getElementById('found').textContent").split(" of ")[0]


FILTERS = {
    "[value=right]": lambda item: item["right"],
    "[value=wrong]": lambda item: item["right"] is False,
    "[name=rescued]": lambda item: item["hint"] is not None,
    "[name=gated]": lambda item: item["gate"] > 0,
    "[name=closed]": lambda item: item["gate"] == 0,
    "[name=cut]": lambda item: item["cut"],
}


def test_filters_work_by_keyboard(opened, items):
    """One after another on the page as it is at first, to which its form goes back."""
    for selector, test in FILTERS.items():
        assert counted(opened) == str(len(items)), selector
        focus(opened, f"form {selector}")
        opened.press(SPACE)
        matching = [item for item in items if test(item)]
        assert counted(opened) == str(len(matching)), selector
        assert opened.js(f"{SHOWN}.length") == len(matching), selector
        assert opened.complaints() == []
        focus(opened, "form [type=reset]")
        opened.press(ENTER)
        opened.wait(f"{SHOWN}.length === {len(items)}")


def test_filters_add_up_and_are_cleared(opened, items):
    focus(opened, "form [value=right]")
    opened.press(SPACE)
    focus(opened, "form [name=step]")
    opened.press("step 3")
    focus(opened, "form [name=rescued]")
    opened.press(SPACE)
    groups = "[...document.querySelectorAll('.group .question .note')].map(x => x.textContent)"
    assert all(text.startswith("step 3") for text in opened.js(groups))
    focus(opened, "form [type=reset]")
    opened.press(ENTER)
    opened.wait(f"{SHOWN}.length === {len(items)}")


def test_text_is_searched(opened, items):
    word = re.search("[a-z]{4,}", " ".join(item["text"] for item in items))[0]
    focus(opened, "form [name=text]")
    opened.press(word.upper())
    found = [i for i in items if word in f"{i['text']} {i['hint'] or ''}".lower()]
    assert counted(opened) == str(len(found)) and 0 < len(found) < len(items)
    opened.press(" and more")
    assert counted(opened) == "0" and opened.js(f"{SHOWN}.length") == 0


def test_a_completion_opens_with_enter_and_says_all_of_it(opened, items):
    focus(opened, "form [name=rescued]")
    opened.press(SPACE)
    focus(opened, ".item summary")
    opened.press(ENTER)
    opened.wait("document.querySelector('.item .body')")
    words = opened.js("document.querySelector('.item .body').innerText")
    rescued = [item for item in items if item["hint"] is not None]
    assert any(item["hint"].strip() in words for item in rescued)
    for name in ("Reasoning and answer", "right answer", "reward accuracy", "advantage", "gate"):
        assert name in words


def test_curves_are_hidden_and_smoothed_by_keyboard(opened):
    lines = "document.querySelectorAll('#panels .panel:nth-child(2) .scatterlayer .trace').length"
    before = opened.js(lines)
    focus(opened, "#panels .panel:nth-child(2) .legend button")
    opened.press(ENTER)
    assert opened.js("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert opened.js(lines) == before - 2
    focus(opened, "#smooth")
    opened.press(RIGHT)
    assert opened.js("document.getElementById('smoothed').textContent") == "mean of 9 steps"
    focus(opened, "#others-box summary")
    opened.press(ENTER)
    opened.wait("document.querySelectorAll('#others .main-svg').length > 5")


def test_focus_is_seen_wherever_the_tab_key_goes(opened):
    """An outline on what has the focus, or on the label of a hidden input."""
    seen = set()
    opened.js("document.activeElement.blur()")
    for _ in range(150):
        opened.press(TAB)
        style = opened.js(
            "(() => { const e = document.activeElement, l = e.nextElementSibling;"
            " const of = e.closest('.pill') && l ? l : e;"
            " return [e.tagName, getComputedStyle(of).outlineStyle, e === document.body] })()"
        )
        if not style[2]:
            assert style[1] != "none", style
            seen.add(style[0])
    assert {"A", "INPUT", "BUTTON", "SUMMARY", "DIV"} <= seen


def test_it_can_be_read_aloud(opened):
    levels = [int(n) for n in opened.js("[...document.querySelectorAll('h1,h2,h3,h4')]"
                                        ".map(x => x.tagName[1])")]  # fmt: skip
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert opened.js("[...document.images].every(x => x.alt.length > 10)")
    told = "x.getAttribute('role') === 'img' && x.ariaLabel.length > 20"
    assert opened.js(f"[...document.querySelectorAll('.plot')].every(x => {told})")
    assert opened.js("[...document.querySelectorAll('input,select')].every(x => x.labels.length)")
    assert opened.js("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(tab, page_file, scheme):
    tab.open(page_file, width=360, height=740, scheme=scheme)
    focus(tab, ".item summary")
    tab.press(ENTER)
    assert tab.js("document.documentElement.scrollWidth") == 360
    wide = tab.js(
        "[...document.querySelectorAll('main *')].filter(x => !x.closest('.scroll,svg,nav')"
        " && x.getBoundingClientRect().right > 360.5 && getComputedStyle(x).overflowX !== 'auto')"
        ".map(x => x.tagName + '.' + x.className)"
    )
    assert wide == [] and tab.complaints() == []


def test_it_follows_the_colour_scheme(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    grid = "getComputedStyle(document.querySelector('#panels .xgrid')).stroke"
    light = opened.js(background), opened.js(grid)
    opened.scheme("dark")
    opened.wait(f"{grid} !== '{light[1]}'")
    assert opened.js(background) != light[0]


def test_hostile_text_is_text_in_a_browser(tab, ended, tmp_path):
    run = hostile_run(ended, tmp_path)
    two = [run, shutil.copytree(ended, tmp_path / "other")]
    for runs in ([run], two):
        tab.open(write_report(runs, ReportFlags(out=str(tmp_path / "page.html"))))
        tab.js("document.querySelectorAll('details').forEach(x => { x.open = true })")
        tab.wait("document.querySelectorAll('.item .body').length > 3")
        tab.wait("document.querySelectorAll('#others .main-svg').length > 1")
        assert tab.complaints() == []
        assert tab.js("document.querySelectorAll('xss').length") == 0
        assert tab.js("document.querySelector('.said.hint').textContent") == PAYLOAD
        legend = tab.js("[...document.querySelectorAll('.legend')].map(x => x.textContent).join()")
        assert "<xss onload=alert(1)>" in legend
        # Plotly knows <a>, <b> and entities: a label shows them as they were written.
        ticks = tab.js("[...document.querySelectorAll('#accuracy .ytick')].map(x => x.textContent)")
        assert "<a href='#'>y</a>" in " ".join(ticks)
        assert len(tab.requests()) == 1
