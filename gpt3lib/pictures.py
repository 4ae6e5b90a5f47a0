"""The drawings of the book: inline SVG from the book's own tensors, one colour per role, moved by CSS alone."""

import hashlib
from contextlib import contextmanager
from html import escape

# one colour per role, in every picture; the site's style sheet may replace them (--draw-input: …)
ROLES = {
    "input": "#2b8a3e",  # tokens that go in: green
    "output": "#d6336c",  # tokens that come out: pink
    "label": "#7048e8",  # the right answer: violet
    "weight": "#1c7ed6",  # numbers that training sets: blue
    "stream": "#e67700",  # numbers that flow through the model: orange
    "untrained": "#868e96",  # a model before training: grey
    "trained": "#ae3ec9",  # and after: magenta
}
CHAR = 9.1  # width of a monospaced character at 15 px


def colour(role: str) -> str:
    """The CSS colour of a role; "ink" is the colour of the text around the picture."""
    if role == "ink":
        return "var(--draw-ink, currentColor)"
    return f"var(--draw-{role}, {ROLES[role]})"


def show_token(token: str) -> str:
    """A token made visible: a space as ·, a line break as ↵."""
    return token.replace(" ", "·").replace("\n", "↵")


def heat(value: float, scale: float, role: str) -> str:
    """SVG attributes of a cell: the role's colour for positive numbers, grey for negative, stronger for larger."""
    strength = min(1.0, abs(value) / scale) if scale else 0.0
    return f'fill="{colour(role if value >= 0 else "untrained")}" fill-opacity="{0.06 + 0.84 * strength:.2f}"'


class Picture:
    """An SVG under construction. Units are pixels; text is at least 13 px at full size.

    alt: what the picture shows, in words, for those who do not see it.
    seconds: how long one step of an animation lasts.
    """

    def __init__(self, width: float, height: float, alt: str, seconds: float = 1.0):
        self.width, self.height, self.alt, self.seconds = width, height, alt, seconds
        self.parts, self.rules, self.n_steps = [], [], 1

    def add(self, svg: str) -> None:
        """Append raw SVG."""
        self.parts.append(svg)

    def rect(self, x, y, w, h, role="ink", fill=0.0, line=1.5, round=4, dash=""):
        """A rectangle with an outline; fill is the opacity of its inside."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.add(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{round}" fill="{colour(role)}" '
            f'fill-opacity="{fill:g}" stroke="{colour(role)}" stroke-width="{line:g}"{dashes}/>'
        )

    def text(self, x, y, words, role="ink", size=14, anchor="middle", mono=False, bold=False):
        """One line of text with its baseline at y."""
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "inherit"
        weight = ' font-weight="600"' if bold else ""
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour(role)}" font-size="{size:g}" text-anchor="{anchor}" '
            f'style="font-family:{family};white-space:pre"{weight}>{escape(str(words))}</text>'
        )

    def line(self, x1, y1, x2, y2, role="ink", line=1.5, dash=""):
        """A straight line."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.add(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{colour(role)}" stroke-width="{line:g}"{dashes}/>'
        )

    def arrow(self, x1, y1, x2, y2, role="ink", line=1.5):
        """A straight line with a head at its end."""
        length = max(1e-6, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        bx, by = x2 - 8 * ux, y2 - 8 * uy
        self.line(x1, y1, bx, by, role, line)
        points = f"{x2:.1f},{y2:.1f} {bx - 4 * uy:.1f},{by + 4 * ux:.1f} {bx + 4 * uy:.1f},{by - 4 * ux:.1f}"
        self.add(f'<polygon points="{points}" fill="{colour(role)}"/>')

    def token(self, x, y, token, role="input", width=None) -> float:
        """A token in its box, 26 px high; returns the box's width."""
        words = show_token(token)
        width = width or CHAR * len(words) + 12
        self.rect(x, y, width, 26, role, fill=0.14)
        self.text(x + width / 2, y + 18, words, role, size=15, mono=True)
        return width

    def cells(self, x, y, numbers, role="stream", cell=22, scale=None, values=False) -> None:
        """A grid of coloured cells from a list of rows; with values=True each number is written in its cell."""
        rows = [[float(number) for number in row] for row in numbers]
        scale = scale or max((abs(number) for row in rows for number in row), default=1.0)
        width = 46 if values else cell
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                left, top = x + j * width, y + i * cell
                self.add(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{width}" height="{cell}" {heat(number, scale, role)} '
                    f'stroke="{colour("ink")}" stroke-opacity="0.25" stroke-width="0.6"/>'
                )
                if values:
                    self.text(left + width / 2, top + cell / 2 + 4.5, f"{number:.2f}", size=13)

    @contextmanager
    def during(self, start: int, stop: int | None = None):
        """What is drawn inside is seen from step `start` until `stop`; without `stop`, to the end of the film."""
        self.n_steps = max(self.n_steps, start + 1, stop or 0)
        outer, self.parts = self.parts, []
        yield
        inner, self.parts = "".join(self.parts), outer
        self.add(f'<g data-from="{start}" data-to="{"end" if stop is None else stop}">{inner}</g>')

    def svg(self) -> str:
        """The finished SVG. Without motion (a reader's setting) the last step stands still."""
        body, style = "".join(self.parts), ""
        spans = sorted({part.split(">")[0] for part in body.split("<g data-from=")[1:]})
        name = "p" + hashlib.sha256(body.encode()).hexdigest()[:8]
        for i, span in enumerate(spans):
            start, stop = span.replace('"', "").split(" data-to=")
            stop = self.n_steps if stop == "end" else int(stop)
            a, b, tick = 100 * int(start) / self.n_steps, 100 * stop / self.n_steps, 0.01
            on, off = "visibility:visible", "visibility:hidden"
            frames = f"0%,{a - tick:.2f}%{{{off}}}" if a else ""
            frames += f"{a:.2f}%,{b - tick:.2f}%{{{on}}}" + (f"{b:.2f}%,100%{{{off}}}" if b < 100 else f"100%{{{on}}}")
            style += f"@keyframes {name}-{i}{{{frames}}}"
            style += f".{name}-{i}{{animation:{name}-{i} {self.n_steps * self.seconds:g}s step-end infinite}}"
            style += f"@media(prefers-reduced-motion:reduce){{.{name}-{i}{{animation:none;{on if b == 100 else off}}}}}"
            body = body.replace(f"<g data-from={span}>", f'<g class="{name}-{i}">')
        if style:
            style = f"<style>{style}.{name}:hover g{{animation-play-state:paused}}</style>"
        return (
            f'<svg class="{name}" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" role="img" '
            f'aria-label="{escape(self.alt)}" style="max-width:100%;min-width:{0.7 * self.width:.0f}px;height:auto">'
            f"{style}{body}</svg>"
        )

    def _repr_html_(self) -> str:
        return f'<div class="picture" style="overflow-x:auto">{self.svg()}</div>'


def tokens(strings: list[str], alt: str, roles: list[str] | str = "input", ids: list[int] | None = None) -> Picture:
    """A strip of tokens, wrapped to the page's width, with their ids below if given."""
    roles = [roles] * len(strings) if isinstance(roles, str) else roles
    places, x, y, row = [], 4.0, 4.0, 56 if ids else 34
    for i, string in enumerate(strings):
        characters = max(len(show_token(string)), len(str(ids[i])) if ids else 0)
        width = CHAR * characters + 12
        if x + width > 560:
            x, y = 4.0, y + row
        places.append((x, y, width))
        x += width + 4
    picture = Picture(568, y + row, alt)
    for i, (string, (x, y, width)) in enumerate(zip(strings, places)):
        picture.token(x, y, string, roles[i], width)
        if ids:
            picture.text(x + width / 2, y + 42, ids[i], size=13)
    return picture


def matrix(numbers, alt: str, role="weight", rows=None, columns=None, values=False, cell=24) -> Picture:
    """A matrix of numbers as coloured cells, with labels for its rows and columns if given."""
    numbers = [[float(number) for number in row] for row in numbers]
    left = 8 + max((CHAR * len(show_token(str(row))) for row in rows or [""]), default=0)
    top = 26 if columns else 6
    wide = 46 if values else cell
    picture = Picture(left + wide * len(numbers[0]) + 8, top + cell * len(numbers) + 8, alt)
    for j, column in enumerate(columns or []):
        picture.text(left + wide * (j + 0.5), top - 8, show_token(str(column)), size=13, mono=True)
    for i, row in enumerate(rows or []):
        picture.text(left - 6, top + cell * (i + 0.7), show_token(str(row)), size=14, anchor="end", mono=True)
    picture.cells(left, top, numbers, role, cell, values=values)
    return picture


def attention_map(weights, strings: list[str], alt: str, cell=30) -> Picture:
    """A (T, T) matrix of attention weights: a row looks at its columns; what the mask forbids stays empty."""
    left = 12 + CHAR * max(len(show_token(string)) for string in strings)
    size = cell * len(strings)
    picture = Picture(left + size + 8, left + size + 8, alt)
    for i, string in enumerate(strings):
        name, middle = show_token(string), left + cell * (i + 0.5)
        picture.text(left - 6, middle + 5, name, "input", size=15, anchor="end", mono=True)
        picture.add(f'<g transform="rotate(-90 {middle + 5:.1f} {left - 6:.1f})">')
        picture.text(middle + 5, left - 6, name, "input", size=15, anchor="start", mono=True)
        picture.add("</g>")
        for j in range(i + 1):
            weight = float(weights[i][j])
            picture.add(
                f'<rect x="{left + j * cell}" y="{left + i * cell}" width="{cell}" height="{cell}" '
                f'{heat(weight, 1.0, "stream")} stroke="{colour("ink")}" stroke-opacity="0.25" stroke-width="0.6">'
                f"<title>{escape(name)} takes {weight:.2f} from {escape(show_token(strings[j]))}</title></rect>"
            )
    return picture
