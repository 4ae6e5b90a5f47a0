"""A chapter in JupyterLab, in a browser: it runs from top to bottom and reads as it does on the page."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

import execute
from form import tags

BOOK = Path(__file__).resolve().parent.parent / "book"
CHAPTER = "01_one_parameter"
SECONDS = 90
RAW = re.compile(r"\{[a-z-]+\}`|`{3,}|:{3,}|:label:|\$\$|^> ", re.MULTILINE)
# so many cells have a count (a folded cell shows none), or one has failed
FINISHED = """(count) => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
    return document.querySelector('[data-mime-type$=".error"]')
        || prompts.filter((prompt) => /[0-9]/.test(prompt.textContent)).length >= count;
}"""
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell is drawn, also those that nobody has scrolled to
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}

# what the open notebook says about itself
FACTS = """() => {
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
    const shown = (element) => !!element && element.getBoundingClientRect().height > 0;
    return cells.map((cell) => ({
        code: cell.classList.contains('jp-CodeCell'),
        shown: shown(cell),
        source: shown(cell.querySelector('.jp-InputArea-editor')),
        text: cell.querySelector('.jp-RenderedMarkdown')?.innerText || '',
        prompt: cell.querySelector('.jp-InputPrompt')?.textContent || '',
        output: !!cell.querySelector('.jp-OutputArea-child'),
        // a cell that failed, a warning, or an output that JupyterLab cannot draw
        errors: [...cell.querySelectorAll('[data-mime-type$=".error"], [data-mime-type$=".stderr"]')].map(
            (element) => element.textContent.trim().slice(-200)),
    }));
}"""


def is_hidden(cell):
    """Whether the page hides a cell's source."""
    return bool(execute.HIDDEN_TAGS & set(tags(cell)))


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the chapters, with settings and state of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(BOOK, folder / "book", ignore=shutil.ignore_patterns("_*", ".*"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / f"{name.replace(':', '/')}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    blank = nbformat.read(folder / "book" / f"{CHAPTER}.ipynb", as_version=4)
    execute.normal_form(blank)
    for cell in blank.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(blank, folder / "book" / f"{CHAPTER}.ipynb")
    port = free_port()
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder / "book",
        "ServerApp.allow_root": True,
        "ServerApp.open_browser": False,
        "IdentityProvider.token": "",
        "LabApp.user_settings_dir": folder / "settings",
        "LabApp.workspaces_dir": folder / "workspaces",
        "LabApp.extension_manager": "readonly",
        "LabApp.news_url": "",
    }
    environment = {**os.environ, **execute.ENVIRONMENT, "JUPYTER_CONFIG_DIR": str(folder / "config")}
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def cells(browser, lab):
    """The chapter's cells in JupyterLab before and after all of them ran."""
    stored = nbformat.read(BOOK / f"{CHAPTER}.ipynb", as_version=4).cells
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    foreign = []
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((lab, "data:", "blob:")) else None)
    page.goto(f"{lab}/lab/tree/{CHAPTER}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.get_by_text(re.compile(r"\| Idle$")).first.wait_for(timeout=60_000)  # the kernel is there
    before = page.evaluate(FACTS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    open_cells = [cell for cell in stored if cell.cell_type == "code" and not is_hidden(cell)]
    page.wait_for_function(FINISHED, arg=len(open_cells), timeout=SECONDS * 1000)
    after = page.evaluate(FACTS)
    page.close()
    assert len(before) == len(after) == len(stored)
    assert foreign == []
    return list(zip(stored, before, after))


def test_every_cell_runs_without_an_error(cells):
    assert [after["errors"] for _, _, after in cells if after["errors"]] == []
    printing = [after["output"] for cell, _, after in cells if cell.get("outputs") and "remove-cell" not in tags(cell)]
    assert printing and all(printing)


def test_no_directive_or_role_is_left_in_the_text(cells):
    texts = [after["text"] for cell, _, after in cells if cell.cell_type == "markdown" and after["shown"]]
    assert any(texts)
    assert [text for text in texts if RAW.search(text)] == []


def test_what_the_page_hides_is_folded_and_nothing_else(cells):
    code = [(cell, before["source"]) for cell, before, _ in cells if cell.cell_type == "code" and before["shown"]]
    hidden = [source for cell, source in code if is_hidden(cell)]
    plain = [source for cell, source in code if not is_hidden(cell)]
    assert hidden and not any(hidden)
    assert plain and all(plain)


def test_solutions_are_folded(cells):
    shown, folded, inside = [], [], False
    for cell, before, _ in cells:
        text = cell.source if cell.cell_type == "markdown" else ""
        inside = inside and not re.match("#{1,3} ", text)
        (folded if inside else shown).append(before["shown"])
        inside = inside or text.startswith("#### Solution")
    assert folded and not any(folded)
    assert all(shown)


def test_a_raw_directive_would_be_found():
    for text in ("{cite}`B20`", "::: {note}", "```{exercise} Title", "text\n:label: ex-1", "> **Box.**"):
        assert RAW.search(text)
    assert not RAW.search("A set {1, 2} and `code`, a > b: [B20].")
