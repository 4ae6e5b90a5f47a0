"""Every page of the site in a browser: on a wide and a narrow screen, in light and in dark."""

import functools
import http.server
import re
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

import axe_playwright_python
import nbformat
import pytest

import execute

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
CHAPTERS = execute.chapters()
REPOSITORY = execute.settings()["repository"]["url"]
WIDE = 1280
OTHERS = ["glossary", "names", "references"]
PAGES = [*CHAPTERS, *OTHERS]
EVERY_PAGE = [*PAGES, "../genindex", "../search"]
Screen = namedtuple("Screen", "width theme")
Visit = namedtuple("Visit", "facts trouble")
Reading = namedtuple("Reading", "axe eyes")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
EYES = (ROOT / "tests" / "reader.js").read_text(encoding="utf-8")

# what a page says about itself
FACTS = """() => {
    const colour = (element) => getComputedStyle(element).backgroundColor.match(/[\\d.]+/g).map(Number);
    const seen = (element) => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
    const root = document.documentElement;
    const wide = [...document.querySelectorAll('article *')].filter((element) => {
        for (let e = element; e && e.tagName !== 'ARTICLE'; e = e.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return false;
        return element.getBoundingClientRect().right > root.clientWidth + 1 && seen(element);
    });
    return {
        sideways: root.scrollWidth - root.clientWidth,
        wide: wide.slice(0, 3).map((element) => element.outerHTML.slice(0, 120)),
        ground: colour(document.body),
        grounds: [...document.querySelectorAll('.cell_output .text_html, .cell_output img')].map(colour),
        title: document.querySelector('article h1')?.innerText,
        math: document.querySelectorAll('.math').length,
        typeset: document.querySelectorAll('.math > mjx-container').length,
        mathErrors: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
        mathjax: !!window.MathJax,
        code: [...document.querySelectorAll('div.highlight')].filter((e) => e.querySelector('pre')).length,
        copy: document.querySelectorAll('div.highlight button.copybtn').length,
        search: [...document.querySelectorAll('form.bd-search, .search-button-field')].filter(seen).length,
        links: [...document.querySelectorAll('a[href]')].map((a) => a.href),
        icons: [...document.querySelectorAll('.article-header-buttons .btn [class*="fa-"]')].filter(seen).length,
        footer: document.querySelector('.extra_footer')?.innerText || '',
        pictures: document.querySelectorAll('div.picture svg').length,
        lost: [...document.images].filter((image) => image.complete && !image.naturalWidth).map((image) => image.src),
        broken: document.querySelectorAll('.problematic, .system-message').length,
        // boxes: the title's bar begins and ends with the box
        boxes: [...document.querySelectorAll('article .admonition:has(> .admonition-title)')].map((box) => {
            const [outer, bar] = [box, box.querySelector('.admonition-title')].map((e) => e.getBoundingClientRect());
            return { kind: box.className, title: box.querySelector('.admonition-title').innerText,
                short: [bar.left - outer.left, outer.right - bar.right].map(Math.round) };
        }),
        cites: [...document.querySelectorAll('article a[href*="references.html#"], article a.citation')].length,
        // keys that no link was made of, outside code and outputs
        rawKeys: (() => {
            const copy = (document.querySelector('article') ?? document.body).cloneNode(true);
            copy.querySelectorAll('pre, code, a, svg, .citation, .output').forEach((e) => e.remove());
            return copy.textContent.match(/\\[[A-Z]{1,3}[0-9]{2}\\]|\\{[a-z-]+\\}`|:::|^#+ /gm) || [];
        })(),
        drawnLinks: [...document.querySelectorAll('article svg a')].map(
            (a) => a.getAttribute('href') || a.getAttribute('xlink:href')),
        // code that scrolls sideways, hidden code included
        scrolls: [...document.querySelectorAll('.cell_input pre')].filter((e) => e.scrollWidth > e.clientWidth + 1)
            .map((e) => e.innerText.slice(0, 80)),
    };
}"""

# before a page is judged: nothing moves, nothing is folded, and of a kind of coloured words in code one is enough
OPEN = """() => {
    const still = document.createElement('style');
    still.textContent = '* { transition: none !important; animation: none !important; }';
    document.head.append(still);
    document.querySelectorAll('details').forEach((e) => { e.open = true; });
    document.querySelectorAll('.toggle-hidden').forEach((e) => e.classList.remove('toggle-hidden'));
    const kinds = new Set();
    document.querySelectorAll('pre span').forEach((e) => {
        const kind = e.className + !!e.closest('.cell_output');
        e.className && kinds.size < kinds.add(kind).size || e.replaceWith(...e.childNodes);
    });
    document.querySelectorAll('pre').forEach((e) => e.normalize());
}"""

# axe's rules, also two that it leaves out by default
JUDGE = """async () => {
    const more = ['label-content-name-mismatch', 'target-size'].map((rule) => [rule, { enabled: true }]);
    const found = await axe.run(document, { resultTypes: ['violations'], preload: false,
        rules: Object.fromEntries(more) });
    return found.violations.flatMap(({ id, nodes }) => nodes.map((n) => `${id}: ${n.html.slice(0, 200)}`));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that prints nothing."""

    def log_message(self, *words):
        """Keep silent."""


@pytest.fixture(scope="session")
def site():
    """The address of the site on this machine, built first if it is missing or older than its sources."""
    built = subprocess.run(["make", "book"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def watch(page, site, trouble):
    """Write down everything on a page that a reader should not meet."""
    page.on("console", lambda m: trouble.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(f"script error: {error}"))
    page.on("requestfailed", lambda r: trouble.append(f"failed: {r.url} {r.failure}"))
    page.on("response", lambda r: trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on(
        "request",
        lambda r: trouble.append(f"foreign: {r.url}") if not r.url.startswith((site, "data:", "blob:")) else None,
    )


def visit(page, address):
    """Open a page, wait until it is quiet and its formulas are set."""
    page.goto(address, wait_until="load")
    page.wait_for_function("() => !window.MathJax || (MathJax.startup && MathJax.startup.promise)")
    page.evaluate("() => window.MathJax && MathJax.startup.promise")
    page.wait_for_load_state("networkidle")


def judge(page):
    """What axe says about a page as it is now."""
    page.evaluate(AXE)
    return page.evaluate(JUDGE)


@pytest.fixture(scope="session")
def visits(browser, site):
    """(chapter, width, theme) -> what the page said; every page is opened once for each screen."""
    found = {}
    for screen in (Screen(WIDE, "light"), Screen(390, "dark")):
        context = browser.new_context(viewport={"width": screen.width, "height": 900}, color_scheme=screen.theme)
        page, trouble = context.new_page(), []
        watch(page, site, trouble)
        for chapter in EVERY_PAGE:
            visit(page, f"{site}/book/{chapter}.html")
            found[chapter, screen.width, screen.theme] = Visit(page.evaluate(FACTS), list(trouble))
            # the other theme on the same screen, without loading the page again
            other = "dark" if screen.theme == "light" else "light"
            page.emulate_media(color_scheme=other)
            page.wait_for_function(f"() => document.documentElement.dataset.theme === '{other}'")
            found[chapter, screen.width, other] = Visit(page.evaluate(FACTS), list(trouble))
            # all readers: a wide page in the dark, a narrow one in the light; the eyes see both, and paper
            page.evaluate(OPEN)
            eyes = {}
            if screen.width == WIDE:
                eyes["dark"] = page.evaluate(EYES)
                page.emulate_media(color_scheme="light")
                page.wait_for_function("() => document.documentElement.dataset.theme === 'light'")
                eyes["light"] = page.evaluate(EYES)
                page.emulate_media(color_scheme="dark")
                page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
                page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
                page.emulate_media(media="print")
                eyes["paper"] = page.evaluate(EYES)
                page.emulate_media(media="screen")
                page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
            found[chapter, screen.width] = Reading(judge(page), eyes)
            page.emulate_media(color_scheme=screen.theme)
            trouble.clear()
        context.close()
    return found


every_page = pytest.mark.parametrize("chapter", PAGES)
every_screen = pytest.mark.parametrize(
    "screen", [Screen(w, t) for w in (WIDE, 390) for t in ("light", "dark")], ids=str
)


@every_page
@every_screen
def test_a_page_loads_without_trouble(visits, chapter, screen):
    facts, trouble = visits[chapter, *screen]
    assert trouble == []
    assert facts["lost"] == [] and facts["broken"] == 0
    assert facts["title"]


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_axe_finds_nothing(visits, page):
    assert visits[page, WIDE].axe == [] and visits[page, 390].axe == []


@pytest.mark.parametrize("page", EVERY_PAGE)
@pytest.mark.parametrize("ground", ["light", "dark", "paper"])
def test_every_text_can_be_read_on_what_is_behind_it(visits, page, ground):
    eyes = visits[page, WIDE].eyes[ground]
    assert eyes["weak"] == [] and (eyes["texts"] > 20 or page not in PAGES)


@every_page
def test_a_narrow_screen_does_not_scroll_sideways(visits, chapter):
    for theme in ("light", "dark"):
        facts = visits[chapter, 390, theme].facts
        assert facts["sideways"] <= 0
        assert facts["wide"] == []


@every_page
def test_the_theme_reaches_the_page_and_its_outputs(visits, chapter):
    for width in (WIDE, 390):
        light, dark = visits[chapter, width, "light"].facts, visits[chapter, width, "dark"].facts
        assert min(light["ground"][:3]) > 230 and max(dark["ground"][:3]) < 50
        # an output's ground is the page's own: transparent, or dark in the dark
        assert all(len(c) == 4 and c[3] == 0 or max(c[:3]) < 70 for c in dark["grounds"])


@every_page
def test_formulas_are_typeset_and_load_nothing_elsewhere(visits, chapter):
    facts = visits[chapter, WIDE, "light"].facts
    assert facts["typeset"] == facts["math"] and facts["mathErrors"] == 0
    assert facts["mathjax"] == (facts["math"] > 0)


@every_page
def test_code_can_be_copied(visits, chapter):
    facts = visits[chapter, WIDE, "light"].facts
    assert facts["copy"] == facts["code"] and (facts["code"] > 0 or chapter in ("glossary", "references"))


@every_page
def test_a_page_names_its_version_and_has_one_search_field(visits, chapter):
    facts = visits[chapter, WIDE, "light"].facts
    assert re.match(r"gpt3lib \d+\.\d+\.\d+", facts["footer"])
    assert facts["search"] == 1
    assert facts["icons"] >= 4  # repository, download, full screen, theme


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_can_be_run_elsewhere_and_downloaded(visits, chapter):
    links = visits[chapter, WIDE, "light"].facts["links"]
    name = REPOSITORY.removeprefix("https://github.com/")
    file = f"book/{chapter}.ipynb"
    assert f"https://colab.research.google.com/github/{name}/blob/main/{file}" in links
    assert f"https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/{file}" in links
    assert any(link.endswith(f"/_sources/{file}") for link in links)
    assert (SITE / "_sources" / file).read_bytes() == (ROOT / file).read_bytes()
    assert REPOSITORY in links


@every_page
def test_a_page_weighs_less_than_a_megabyte(chapter):
    html = SITE / "book" / f"{chapter}.html"
    images = set(re.findall(r'src="(\.\./_images/[^"]+)"', html.read_text()))
    assert html.stat().st_size + sum((html.parent / image).stat().st_size for image in images) <= 1_000_000


@every_page
def test_a_box_has_a_title_as_wide_as_itself(visits, chapter):
    for width in (WIDE, 390):
        boxes = visits[chapter, width, "light"].facts["boxes"]
        assert [box["title"] for box in boxes if max(map(abs, box["short"])) > 4] == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_exercises_and_solutions_are_boxes(visits, chapter):
    boxes = visits[chapter, WIDE, "light"].facts["boxes"]
    cells = nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exercises = [box["title"] for box in boxes if "exercise" in box["kind"].split()]
    solutions = [box["kind"].split() for box in boxes if "solution" in box["kind"].split()]
    numbers = [re.match(r"Exercise \d+: ", title)[0] for title in exercises]
    assert numbers == re.findall(r"^### (Exercise \d+: )", text, re.MULTILINE)
    assert len(solutions) == len(exercises) and all("toggle-hidden" in kind for kind in solutions)
    notes = re.findall(r"(?:^|\n\n)> \*\*", text)
    assert len(boxes) == len(exercises) + len(solutions) + len(notes)


@every_page
def test_no_citation_or_directive_is_left_as_it_was_written(visits, chapter):
    assert visits[chapter, WIDE, "light"].facts["rawKeys"] == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_citations_are_links(visits, chapter):
    cells = nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4).cells
    cited = any(re.search(r"\[[A-Z]{1,3}\d\d\]", cell.source) for cell in cells if cell.cell_type == "markdown")
    assert (visits[chapter, WIDE, "light"].facts["cites"] > 0) == cited


@every_page
def test_links_in_drawings_lead_to_pages(visits, chapter):
    links = visits[chapter, WIDE, "light"].facts["drawnLinks"]
    assert [link for link in links if not (SITE / "book" / link.split("#")[0]).is_file()] == []
    assert not [link for link in links if link.endswith(".ipynb")]


@every_page
def test_code_does_not_scroll_sideways_on_a_wide_screen(visits, chapter):
    assert visits[chapter, WIDE, "light"].facts["scrolls"] == []


def test_a_line_of_88_characters_fits_everywhere_on_a_wide_screen(browser, site):
    page = browser.new_page(viewport={"width": WIDE, "height": 900})
    page.goto(f"{site}/book/04_attention.html")
    widths = page.evaluate("""() => {
        document.querySelectorAll('.toggle-hidden').forEach((box) => box.classList.remove('toggle-hidden'));
        return [...document.querySelectorAll('.cell_input pre')].map((code) => {
            code.textContent = 'x'.repeat(88);
            return code.scrollWidth - code.clientWidth;
        });
    }""")
    assert len(widths) > 20 and max(widths) <= 0
    page.close()


def test_the_front_page_has_a_living_picture(visits):
    assert visits["index", WIDE, "light"].facts["pictures"] >= 1


def test_the_address_of_the_site_leads_to_the_front_page(browser, site):
    page = browser.new_page()
    page.goto(site)
    page.wait_for_url(f"{site}/book/index.html")
    page.close()


def test_search_finds_a_chapter(browser, site):
    page, trouble = browser.new_page(), []
    watch(page, site, trouble)
    page.goto(f"{site}/book/index.html")
    page.locator(".search-button-field").first.click()
    page.locator("#pst-search-dialog input[type=search]").fill("attention")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=attention**")
    page.wait_for_selector("#search-results li a")
    assert any("04_attention" in link.get_attribute("href") for link in page.locator("#search-results li a").all())
    page.wait_for_load_state("networkidle")
    assert trouble == []
    page.close()


def test_a_watched_page_that_misbehaves_is_caught(browser, site):
    page, trouble = browser.new_page(), []
    watch(page, site, trouble)
    page.goto(f"{site}/book/references.html")
    page.evaluate("() => fetch('/no-such-file')")
    page.evaluate("() => { console.error('oops'); setTimeout(() => { throw new Error('thrown') }) }")
    page.evaluate("() => fetch('http://127.0.0.1:9/elsewhere').catch(() => 0)")
    page.evaluate("() => { document.querySelector('article').innerHTML += '<div style=\"width:2000px\">wide</div>' }")
    words = " ".join(trouble)
    assert all(word in words for word in ("404: ", "oops", "thrown", "foreign: http://127.0.0.1:9", "failed: "))
    assert page.evaluate(FACTS)["sideways"] > 0
    page.close()


# --- any reader's eyes and hands ---


@pytest.fixture
def opened(browser, site):
    """Opens a page of the book, wide or narrow."""
    pages = []

    def open_page(name, width=WIDE):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        pages.append(page)
        visit(page, f"{site}/book/{name}.html")
        return page

    yield open_page
    for page in pages:
        page.close()


def test_axe_and_the_eyes_find_what_is_broken_on_purpose(opened):
    page = opened("06_decoder")
    page.evaluate(OPEN)
    assert judge(page) == [] and page.evaluate(EYES)["weak"] == []
    page.evaluate("""() => {
        const toggle = document.querySelector('.primary-toggle');
        ['aria-label', 'title'].forEach((name) => toggle.removeAttribute(name));
        document.querySelector('.search-button-field').setAttribute('aria-label', 'Find');
        document.querySelector('.picture svg[role=img]').removeAttribute('aria-label');
        document.querySelector('#pst-primary-sidebar').removeAttribute('role');
        document.querySelector('article p').style.color = '#999999';
        document.querySelector('article .picture text').style.fill = '#999999';
    }""")
    rules = {found.split(":")[0] for found in judge(page)}
    assert {"button-name", "svg-img-alt", "label-content-name-mismatch", "region", "color-contrast"} <= rules
    weak = page.evaluate(EYES)["weak"]
    assert sum("2.85 : 1" in text for text in weak) >= 2 and any("<text" in text for text in weak)


@pytest.mark.parametrize("width", [WIDE, 390])
@pytest.mark.parametrize(
    "opener, dialog", [("search-button", "#pst-search-dialog"), ("primary-toggle", "#pst-primary-sidebar-modal")]
)
def test_axe_finds_nothing_in_a_dialog_and_escape_closes_it(opened, width, opener, dialog):
    if (width, opener) == (WIDE, "primary-toggle"):
        return  # there the button hides the sidebar, which is no dialog
    page = opened("01_one_parameter", width)
    button = page.locator(f"button.{opener}:visible, button.{opener}__button:visible").first
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{dialog}[open]")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(f"() => document.documentElement.dataset.theme === '{theme}'")
        page.wait_for_timeout(400)  # the dialog and its colours come slowly
        assert judge(page) == []
    page.keyboard.press("Escape")
    page.wait_for_function(f"() => !document.querySelector('{dialog}').open")
    assert button.evaluate("(e) => e === document.activeElement")


# the element in focus: which one it is, and whether a reader sees that
FOCUS = """(all) => {
    const e = document.activeElement, box = e.getBoundingClientRect();
    const style = getComputedStyle(e);
    return {
        at: window.stops.indexOf(e), html: `${e.outerHTML.slice(0, 150)} ${[box.x, box.y, box.width].map(Math.round)}`,
        ring: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 || style.boxShadow !== 'none',
        seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
    };
}"""
STOPS = """() => {
    const kinds = "a[href], button, input, summary, [tabindex='0'], svg a";
    window.stops = [...document.querySelectorAll(kinds)].filter((e) =>
        e.tabIndex >= 0 && e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length);
    return window.stops.map((e) => e.outerHTML.slice(0, 150));
}"""


@pytest.mark.parametrize("chapter, width", [("index", WIDE), ("01_one_parameter", WIDE), ("06_decoder", 390)])
def test_tab_reaches_everything_in_order_and_shows_where_it_is(opened, chapter, width):
    page = opened(chapter, width)
    page.add_style_tag(content="* { transition: none !important; }")
    stops, visited = page.evaluate(STOPS), []
    for _ in range(len(stops)):
        page.keyboard.press("Tab")
        visited.append(page.evaluate(FOCUS))
    missed = set(range(len(stops))) - {stop["at"] for stop in visited}
    assert [stops[i] for i in missed] == []
    assert [stop["at"] for stop in visited] == sorted(stop["at"] for stop in visited)
    assert [stop["html"] for stop in visited if not (stop["ring"] and stop["seen"])] == []


def test_keys_work_everything(opened, site):
    page = opened("01_one_parameter")
    press = lambda where: (page.locator(where).first.focus(), page.keyboard.press("Enter"))
    shown = lambda where: page.locator(where).first.is_visible()
    # the way past the sidebar
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.url.endswith("#main-content")
    page.keyboard.press("Tab")
    assert page.evaluate("() => !!document.activeElement.closest('main')")
    # the theme: light, dark, the system's
    modes = [
        press(".theme-switch-button") and page.evaluate("() => document.documentElement.dataset.mode") for _ in "123"
    ]
    assert sorted(modes) == ["auto", "dark", "light"]
    # folded code, a folded solution, a copy
    for folded, inside in [
        ("details > summary", "details pre"),
        ("button.toggle-button", ".solution > p:not(.admonition-title)"),
    ]:
        assert not shown(inside)
        press(folded)
        page.wait_for_timeout(400)
        assert shown(inside)
        page.keyboard.press("Space")
        page.wait_for_timeout(400)
        assert not shown(inside)
    press(".cell_input button.copybtn:visible")
    page.wait_for_selector("button.copybtn.success")
    # a menu opens and closes
    press(".dropdown-launch-buttons button")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("() => !!document.activeElement.closest('.dropdown-launch-buttons .dropdown-menu.show a')")
    page.keyboard.press("Escape")
    assert not shown(".dropdown-launch-buttons .dropdown-menu")
    # the sidebar goes and comes
    press(".primary-toggle:visible")
    page.wait_for_timeout(500)
    assert not shown("#pst-primary-sidebar .bd-links")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert shown("#pst-primary-sidebar .bd-links")
    # a link of the map
    press(".picture svg a")
    page.wait_for_url("**/book/*.html")
    assert not page.url.endswith("01_one_parameter.html")


def test_a_film_stops_in_focus_as_under_the_pointer(opened):
    page = opened("index")
    film = page.locator(".picture svg[tabindex]").first
    plays = lambda: film.evaluate(
        "(e) => [...new Set(e.getAnimations({ subtree: true }).map((a) => a.playState))].sort()"
    )
    assert plays() == ["running"]
    film.focus()
    assert plays() == ["paused"]
    page.keyboard.press("Tab")
    assert plays() == ["running"]


def test_what_scrolls_can_be_scrolled_by_keys(opened):
    page = opened("04_attention", 390)
    page.evaluate(OPEN)
    page.wait_for_timeout(500)
    hidden = page.evaluate("""() => [...document.querySelectorAll('article *')].filter((e) =>
        e.scrollWidth > e.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
        && e.tabIndex < 0 && !e.querySelector('a, button, [tabindex="0"]')).map((e) => e.outerHTML.slice(0, 100))""")
    assert hidden == []


def test_the_page_is_printed_in_light_colours(opened):
    page = opened("01_one_parameter")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    themes = page.evaluate("""() => ['beforeprint', 'afterprint'].map((event) => {
        window.dispatchEvent(new Event(event));
        return document.documentElement.dataset.theme;
    })""")
    assert themes == ["light", "dark"]
