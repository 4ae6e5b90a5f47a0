"""Every page of the site in a browser: on a wide and a narrow screen, in light and in dark."""

import functools
import http.server
import re
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

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
Screen = namedtuple("Screen", "width theme")
Visit = namedtuple("Visit", "facts trouble")

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
            const copy = document.querySelector('article').cloneNode(true);
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


@pytest.fixture(scope="session")
def visits(browser, site):
    """(chapter, width, theme) -> what the page said; every page is opened once for each screen."""
    found = {}
    for screen in (Screen(WIDE, "light"), Screen(390, "dark")):
        context = browser.new_context(viewport={"width": screen.width, "height": 900}, color_scheme=screen.theme)
        page, trouble = context.new_page(), []
        watch(page, site, trouble)
        for chapter in PAGES:
            visit(page, f"{site}/book/{chapter}.html")
            found[chapter, screen.width, screen.theme] = Visit(page.evaluate(FACTS), list(trouble))
            # the other theme on the same screen, without loading the page again
            other = "dark" if screen.theme == "light" else "light"
            page.emulate_media(color_scheme=other)
            page.wait_for_function(f"() => document.documentElement.dataset.theme === '{other}'")
            found[chapter, screen.width, other] = Visit(page.evaluate(FACTS), list(trouble))
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
