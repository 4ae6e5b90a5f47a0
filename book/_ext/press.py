"""What the site needs beyond Jupyter Book: citation labels, no script without a use, the version on every page."""

import re
import subprocess
import tomllib
from pathlib import Path

from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle


class KeyLabels(BaseLabelStyle):
    """The label of a source is its key: [B20], not a number that moves when a source is added."""

    def format_labels(self, sorted_entries):
        """One label per entry."""
        return [entry.key for entry in sorted_entries]


class KeyStyle(PlainStyle):
    """Plain formatting with keys as labels."""

    default_label_style = KeyLabels


def version_line(root: Path) -> str:
    """The version of the library and, in a git checkout, the commit the site was made from."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    commit = f" · {git.stdout.strip()}" if git.returncode == 0 else ""
    return f"<p>{project['name']} {project['version']}{commit} · code MIT, words and pictures CC BY 4.0</p>"


def leave_out_live_code(app) -> None:
    """Disconnect sphinx-thebe: it needs other hosts, and the book does not use it."""
    for listeners in app.events.listeners.values():
        listeners[:] = [entry for entry in listeners if not entry.handler.__module__.startswith("sphinx_thebe")]
    app.registry.css_files[:] = [entry for entry in app.registry.css_files if entry[0] != "sphinx-thebe.css"]


def leave_out_unused_math(app, pagename, templatename, context, doctree) -> None:
    """Load MathJax where a formula stands; Sphinx also loads it where a page below the page has one."""
    if not app.env.get_domain("math").data["has_equations"].get(pagename):
        context["script_files"] = [
            script
            for script in context["script_files"]
            if "mathjax/" not in str(getattr(script, "filename", script))
            and "window.MathJax" not in getattr(script, "attributes", {}).get("body", "")
        ]


def leave_out_icon_script(app, exception) -> None:
    """Take the theme's icon script (1.5 MB) out of the finished pages: its style sheet draws the same icons."""
    script = re.compile(r"\s*<(script|link)\b[^>]*fontawesome\.js[^>]*>(</script>)?")
    for path in Path(app.outdir).rglob("*.html"):
        path.write_text(script.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (Path(app.outdir) / "_static" / "scripts").glob("fontawesome.js*"):
        path.unlink()


def print_version(app, config) -> None:
    """Put the version line below every page."""
    config.html_theme_options["extra_footer"] = version_line(Path(app.srcdir))


def setup(app):
    """Register with Sphinx."""
    register_plugin("pybtex.style.formatting", "keys", KeyStyle)
    leave_out_live_code(app)
    app.connect("config-inited", print_version)
    app.connect("build-finished", leave_out_icon_script)
    app.connect("html-page-context", leave_out_unused_math, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
