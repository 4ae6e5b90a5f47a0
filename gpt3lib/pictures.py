"""The book's pen: inline SVG from tensors, one colour per role, moved by CSS alone."""

# Made from book/a_pictures.ipynb by tools/export.py; edit the chapter.
import re
from base64 import b64encode
from contextlib import contextmanager
from hashlib import sha256
from html import escape
from io import BytesIO
from math import ceil, floor, hypot, inf, log10
from textwrap import fill
from unicodedata import east_asian_width
from xml.etree import ElementTree

ROLES = {
    "input": "#2f9e44",  # tokens that go in: green
    "output": "#e64980",  # tokens that come out: pink
    "label": "#845ef7",  # the right answer: violet
    "weight": "#228be6",  # numbers that training sets: blue
    "stream": "#f76707",  # numbers that flow through the model: orange
    "untrained": "#868e96",  # a model before training: grey
    "trained": "#be4bdb",  # and after: magenta
}


class PictureError(ValueError):
    """A drawing that cannot be made: an unknown role or part, no words, no time."""


def colour(role: str) -> str:
    """The CSS colour of a role; "ink" is the colour of the text around the picture.

    Raises PictureError for a role that ROLES does not have.
    """
    if role != "ink" and role not in ROLES:
        raise PictureError(f"no role {role!r}; there are ink, {', '.join(ROLES)}")
    return "currentColor" if role == "ink" else f"var(--{role})"


def palette(svg: str) -> str:
    """CSS that gives each role in `svg` its colour.

    It is the site's own --draw-input and so on, or else ours mixed with the ink.
    """
    rules = ""
    for role, value in ROLES.items():
        mixed = f"color-mix(in srgb,{value} 60%,currentColor)"
        rules += f"--{role}:var(--draw-{role},{mixed});" * (colour(role) in svg)
    return rules


CHAR = 9.1  # width of a monospaced character at 15 px
WIDTH = 440  # width of a picture that fills the page; at 80 % it fits on a phone


def show_token(token: str) -> str:
    """A token made visible: a space as ·, a line break as ↵, a tab as ⇥."""
    return str(token).translate({32: "·", 10: "↵", 9: "⇥", 13: "␍"})


def token_width(token: str) -> float:
    """The width of a token's box in pixels; an emoji, like 法, takes two columns."""
    columns = (2 if east_asian_width(sign) in "WF" else 1 for sign in show_token(token))
    return 12 + CHAR * sum(columns)


def px(value: float) -> str:
    """A coordinate with at most one decimal: 12, 12.5."""
    return f"{round(float(value), 1) + 0.0:.1f}".removesuffix(".0")


def digits(value: float) -> str:
    """A number for a title: two digits, but always a decimal point: 0.031, 12.0."""
    size = abs(value)
    places = 6 if size < 1e-6 else max(1, 1 - floor(log10(size)))
    return f"{round(value, places) + 0.0:.{places}f}"


def heat(value: float, scale: float, role: str, most: float = 0.9) -> str:
    """SVG attributes of a cell: the role's colour, or grey for a negative number.

    ±scale is the strongest; noise below a thousandth of it does not change the colour.
    """
    strength = min(1.0, abs(value) / scale) if scale else 0.0
    opacity = 0.06 + (most - 0.06) * strength
    role = role if value >= -scale / 1000 else "untrained"
    return f'fill="{colour(role)}" fill-opacity="{opacity:.2f}"'


def stroke(role: str, line: float, dash: str = "") -> str:
    """SVG attributes of a line; dash is the lengths of its strokes and gaps."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{colour(role)}" stroke-width="{line:g}"{dashes}'


class Sheet:
    """A still drawing under construction. Units are pixels, y grows downwards.

    alt: what it shows, in words, for those who do not see it. Raises PictureError
    when it is empty.
    """

    kind = 'role="img"'  # what it is to a screen reader: one image

    def __init__(self, width: float, height: float, alt: str):
        if not alt.strip():
            raise PictureError("a picture needs alt, its content in words")
        self.width, self.height, self.alt, self.parts = width, height, alt, []

    def add(self, svg: str) -> None:
        """Append raw SVG."""
        self.parts.append(svg)

    def rect(self, x, y, w, h, role="ink", fill=0.0, line=1.5, round=4, dash=""):
        """A rectangle with an outline; fill is the opacity of its inside."""
        place = f'x="{px(x)}" y="{px(y)}" width="{px(w)}" height="{px(h)}"'
        inside = f'rx="{round}" fill="{colour(role)}" fill-opacity="{fill:.2g}"'
        self.add(f"<rect {place} {inside} {stroke(role, line, dash)}/>")

    def text(
        self,
        x,
        y,
        words,
        role="ink",
        size=14,
        anchor="middle",
        mono=False,
        bold=False,
        upwards=False,
    ):
        """One line of text with its baseline at y, or read upwards from y."""
        style = "font-family:ui-monospace,Menlo,Consolas,monospace;" * mono
        look = f'fill="{colour(role)}" font-size="{size:g}" text-anchor="{anchor}"'
        look += f' style="{style}white-space:pre"' + ' font-weight="600"' * bold
        look += f' transform="rotate(-90 {px(x)} {px(y)})"' * upwards
        words = escape(str(words))
        self.add(f'<text x="{px(x)}" y="{px(y)}" {look}>{words}</text>')

    def line(self, x1, y1, x2, y2, role="ink", line=1.5, dash=""):
        """A straight line."""
        way = f"M{px(x1)},{px(y1)}L{px(x2)},{px(y2)}"
        self.add(f'<path d="{way}" {stroke(role, line, dash)}/>')

    def arrow(self, x1, y1, x2, y2, role="ink", line=1.5):
        """A straight line with a head at its end."""
        long = max(1e-6, hypot(x2 - x1, y2 - y1))
        ux, uy = 8 * (x2 - x1) / long, 8 * (y2 - y1) / long
        self.line(x1, y1, x2 - ux, y2 - uy, role, line)
        head = f"l{px(-ux - uy / 2)},{px(ux / 2 - uy)}l{px(uy)},{px(-ux)}z"
        self.add(f'<path d="M{px(x2)},{px(y2)}{head}" fill="{colour(role)}"/>')

    def token(self, x, y, token, role="input", width=None) -> float:
        """A token in its box, 26 px high; returns the box's width.

        What does not fit into `width` becomes ….
        """
        words, width = show_token(token), width or token_width(token)
        while len(words) > 1 and token_width(words) > width + 0.1:
            words = words[:-2] + "…"
        self.rect(x, y, width, 26, role, fill=0.12)
        self.text(x + width / 2, y + 18, words, role, size=15, mono=True)
        return width

    def cells(self, x, y, numbers, role="stream", cell=22, scale=None, values=False):
        """A grid of coloured cells from a list of rows.

        With values=True each number is written in its cell, too.
        """
        rows = [[float(number) for number in row] for row in numbers]
        flat = [abs(number) for row in rows for number in row]
        scale, wide = float(scale or max(flat, default=1.0)), 46 if values else cell
        self.add('<g stroke="currentColor" stroke-opacity="0.25" stroke-width="0.6">')
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                place = f'x="{px(x + j * wide)}" y="{px(y + i * cell)}"'
                look = heat(number, scale, role, most=0.45 if values else 0.9)
                look = f'{place} width="{px(wide)}" height="{px(cell)}" {look}'
                self.add(f"<rect {look}><title>{digits(number)}</title></rect>")
        self.add("</g>")
        for i, row in enumerate(rows if values else []):
            for j, number in enumerate(row):
                place = x + (j + 0.5) * wide, y + (i + 0.5) * cell + 5
                self.text(*place, f"{round(number, 2) + 0.0:.2f}")

    def svg(self, parts: list[str] | None = None, attributes: str = "") -> str:
        """The finished SVG. On a phone it shrinks to 80 %, then its box scrolls."""
        body = "".join(parts or self.parts)
        style = f"max-width:100%;min-width:{0.8 * self.width:.0f}px;height:auto;"
        frame = f'viewBox="0 0 {px(self.width)} {px(self.height)}"'
        frame += f' width="{px(self.width)}" {self.kind}'
        look = f'aria-label="{escape(self.alt)}" style="{style}{palette(body)}"'
        return f"<svg{attributes} {frame} {look}>{body}</svg>"

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"

    def _repr_html_(self) -> str:
        return f'<div class="picture" style="overflow-x:auto">{self.svg()}</div>'


def keyframes(name: str, span: tuple, n_steps: int, seconds: float) -> str:
    """CSS that shows the class `name` during span = (start, stop, glides) of n_steps.

    A step of rest follows. What glides comes from (--x, --y), which its element sets.
    """
    start, stop, glides = span

    def at(step):
        return f"{round(100 * step / (n_steps + 1), 3):g}%"

    fade = min(0.15, (stop - start) / 3)
    frames = "0%{opacity:1}"
    if start:
        frames = f"0%,{at(start)}{{opacity:0}}{at(start + fade)}{{opacity:1}}"
    if stop < n_steps:
        frames += f"{at(stop - fade)}{{opacity:1}}{at(stop)},100%{{opacity:0}}"
    else:
        frames += "100%{opacity:1}"
    if glides:
        there = at(min(start + 0.7, stop))
        frames += f"0%,{at(start)}{{transform:translate(var(--x),var(--y))}}"
        frames += f"{there},100%{{transform:none}}"
    play = f"animation:{name} {(n_steps + 1) * seconds:g}s infinite"
    return f"@keyframes {name}{{{frames}}}.{name}{{{play}}}"


class Picture(Sheet):
    """A sheet that may be a film; `seconds` is how long a step lasts.

    The film stops under the pointer and in focus.
    """

    def __init__(self, width: float, height: float, alt: str, seconds: float = 1.0):
        super().__init__(width, height, alt)
        self.seconds, self.span = seconds, (0, inf)

    @contextmanager
    def during(self, start: float, stop: float | None = None, arrive=(0, 0)):
        """What is drawn inside is seen from step `start` until `stop`, or to the end.

        It glides to its place from `arrive` = (dx, dy) pixels away. Inside another
        `during` it is seen while both are. Raises PictureError when that is never.
        """
        outer, stop = self.span, inf if stop is None else stop
        self.span = start, stop = max(start, outer[0]), min(stop, outer[1])
        if start >= stop:
            when = f"from step {start:g} until step {stop:g}"
            raise PictureError(f"nothing can be seen {when}")
        glides, (dx, dy) = any(arrive), arrive
        way = f' style="--x:{px(dx)}px;--y:{px(dy)}px"' * glides
        self.add(((start, stop, glides), way))
        yield
        self.add("</g>")
        self.span = outer

    def svg(self) -> str:
        """The finished SVG. Without motion, as on paper, the last step stands still."""
        groups = [part for part in self.parts if isinstance(part, tuple)]
        if not groups:
            return super().svg()
        spans = [*dict.fromkeys(span for span, _ in groups)]  # a class for each
        ends = [start + 1 if stop == inf else stop for start, stop, _ in spans]
        n_steps = ceil(max(ends))
        timing = repr((self.alt, self.seconds, spans))  # places are not part of a name
        name = "p" + sha256(timing.encode()).hexdigest()[:8]
        film = n_steps, self.seconds
        rules = [keyframes(f"{name}-{i}", spans[i], *film) for i in range(len(spans))]
        rules.append(f".{name}:is(:hover,:focus) g{{animation-play-state:paused}}")
        media = "screen and (prefers-reduced-motion:no-preference)"
        parts = [f"<style>@media {media}{{{''.join(rules)}}}</style>"]
        for part in self.parts:
            if isinstance(part, tuple):
                span, way = part
                look = f'class="{name}-{spans.index(span)}"{way}'
                part = f'<g {look} opacity="{int(span[1] >= n_steps)}">'
            parts.append(part)
        return super().svg(parts, f' class="{name}" tabindex="0"')


def wrap(strings, left=4.0, top=4.0, right=WIDTH - 4, row=34, widths=None) -> tuple:
    """Places (x, y, width) for tokens in lines, and the y below the last line.

    The lines go from `left` to `right`; a new one begins `row` pixels below.
    """
    places, x, y = [], left, top
    for width in widths or [token_width(string) for string in strings]:
        width = min(width, right - left)
        if x + width > right:
            x, y = left, y + row
        places.append((x, y, width))
        x += width + 4
    return places, y + row


def token_row(picture: Picture, strings, places, roles="input") -> None:
    """Tokens at their places; roles is one role for all, or a list."""
    roles = [roles] * len(strings) if isinstance(roles, str) else roles
    for string, (x, y, width), role in zip(strings, places, roles):
        picture.token(x, y, string, role, width)


def tokens(strings, alt: str, roles: list[str] | str = "input", ids=None) -> Picture:
    """A strip of tokens, wrapped to the page's width, with their ids below if given."""
    names = [] if ids is None else [str(int(i)) for i in ids]
    widths = [max(map(token_width, pair)) for pair in zip(strings, names)]
    places, bottom = wrap(strings, row=56 if names else 34, widths=widths)
    right = max((x + width + 4 for x, _, width in places), default=8)
    picture = Picture(right, bottom, alt)
    token_row(picture, strings, places, roles)
    for name, (x, y, width) in zip(names, places):
        picture.text(x + width / 2, y + 43, name)
    return picture


def matrix(
    numbers,
    alt: str,
    role="weight",
    rows=None,
    columns=None,
    values=False,
    cell=24,
    scale=None,
    names="ink",
) -> Picture:
    """A matrix of numbers as coloured cells.

    rows and columns are their names, in the colour of the role `names`; cell is in
    pixels; ±scale is the strongest colour, the largest number if it is not given.
    """
    numbers = [[float(number) for number in row] for row in numbers]
    wide = 46 if values else cell
    left = 12 + max((token_width(row) - 12 for row in rows or []), default=-6)
    above = max((token_width(column) - 12 for column in columns or []), default=0)
    upwards = above > wide
    top = 12 + above if upwards else 26 if columns else 6
    right = left + wide * max(map(len, numbers)) + 8
    picture = Picture(right, top + cell * len(numbers) + 8, alt)
    anchor = "start" if upwards else "middle"
    look = {"role": names, "size": 15, "mono": True}
    for j, column in enumerate(columns or []):
        x, words = left + wide * (j + 0.5) + 5 * upwards, show_token(column)
        picture.text(x, top - 7, words, anchor=anchor, upwards=upwards, **look)
    for i, row in enumerate(rows or []):
        y = top + cell * (i + 0.5) + 5
        picture.text(left - 6, y, show_token(row), anchor="end", **look)
    picture.cells(left, top, numbers, role, cell, scale, values)
    return picture


INK = "#757575"  # what matplotlib draws with; in the page it becomes the text's colour
CYCLE = ["stream", "weight", "trained", "input", "output", "label", "untrained"]


def plot_style() -> None:
    """Set matplotlib to the book's look: no ground, the page's ink, the roles' colours.

    A plot is as wide as a picture, 6.1 inches of 72 pixels; its smallest text has 12.
    """
    from matplotlib import cycler, pyplot  # here: the library needs no matplotlib

    inked = ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"]
    inked += ["xtick.color", "ytick.color", "legend.labelcolor"]
    clear = ["figure.facecolor", "axes.facecolor", "savefig.facecolor"]
    small = ["xtick.labelsize", "ytick.labelsize", "legend.fontsize"]
    look = dict.fromkeys(inked, INK) | dict.fromkeys(clear, "none")
    look |= {"font.size": 13, "axes.titlesize": 14} | dict.fromkeys(small, 12)
    look |= {"figure.figsize": (6.1, 3.2), "figure.dpi": 110, "legend.frameon": False}
    look["axes.prop_cycle"] = cycler(color=[ROLES[role] for role in CYCLE])
    off = ["axes.spines.top", "axes.spines.right", "path.simplify"]
    look |= dict.fromkeys(off, False)  # a line keeps each of its points
    pyplot.rcParams.update(look)


def plot_style_value(style: str) -> str:
    """A style of matplotlib's SVG in the page's colours, without fonts and blanks.

    A role's colour becomes its variable, every grey the ink, white nothing.
    """
    style = re.sub(r"font-family:[^;]*;?|\s", "", style.lower())
    style = style.replace("#ffffff", "none")
    for role, value in ROLES.items():
        style = style.replace(value, colour(role))
    style = re.sub(r"#([0-9a-f]{2})\1\1", colour("ink"), style)
    style = re.sub(r"opacity:[\d.]+", lambda m: f"opacity:{float(m[0][8:]):.2g}", style)
    legible = lambda m: f"size:{max(12, float(m[0][5:])):g}"
    style = re.sub(r"size:[\d.]+", legible, style)
    return re.sub(r"(width|array|offset):[\d.,]+", lambda m: plot_place(m[0]), style)


def plot_place(place: str) -> str:
    """Coordinates of matplotlib's SVG with one decimal, in few characters."""
    place = re.sub(r"rotate\(-0 [^)]*\)", "", place)
    place = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: px(found[0]), place)
    return re.sub(r"\s*([A-Za-z])\s+(?=[-\d])", r"\1", place.strip())


def plot_element(element, names: dict[str, str]) -> str:
    """One element of matplotlib's SVG, with all that is inside it, as short markup.

    names: what the elements that others refer to are called in the page. Other names,
    the style sheet (it would hold for the whole page) and empty groups are dropped.
    """
    tag = element.tag.split("}")[1]
    style = element.get("style", "")
    if tag in ("metadata", "style") or (tag == "path" and style == "fill: none"):
        return ""
    inside = escape((element.text or "").strip()) if tag[0] == "t" else ""
    inside += "".join(plot_element(child, names) for child in element)
    attributes = ""
    for key, value in element.attrib.items():
        key = key.split("}")[-1]
        if key == "style":
            value = plot_style_value(value)
        elif key == "id":
            value = names.get(value, "")
        elif key in ("clip-path", "href"):
            value = re.sub(r"(?<=#)\w+", lambda found: names[found[0]], value)
        else:
            value = plot_place(value)
        attributes += f' {key}="{escape(value)}"' if value else ""
    if tag in ("g", "defs") and not (attributes and inside):
        return f"<defs>{inside}</defs>" if tag == "defs" and inside else inside
    return f"<{tag}{attributes}>{inside}</{tag}>" if inside else f"<{tag}{attributes}/>"


MOST = 40_000  # bytes of a plot; a larger one becomes a bitmap


class Bitmap(Sheet):
    """A plot that is too large as a drawing: a PNG in an <img>."""

    def svg(self) -> str:
        """The <img>, with the measures of a drawing."""
        look = f"max-width:100%;min-width:{0.8 * self.width:.0f}px;height:auto"
        size = f'width="{px(self.width)}" alt="{escape(self.alt)}" style="{look}"'
        data = f"data:image/png;base64,{b64encode(self.parts[0]).decode()}"
        return f'<img {size} src="{data}">'


def plot(alt: str, figure=None) -> Sheet:
    """matplotlib's current figure, or the given one, as a drawing of the page.

    Its text stays text, in the page's font; greys are the page's ink, and the colours
    of ROLES are those of the pictures. An inch is 72 pixels. The figure is closed.
    What holds an image, or would be larger than 40 KB as SVG, becomes a bitmap; its
    grey has a contrast of 4 on any ground. Raises PictureError without alt.
    """
    from matplotlib import pyplot, rc_context  # here: the library needs no matplotlib

    figure = figure or pyplot.gcf()
    sheet = Sheet(*(72 * figure.get_size_inches()), alt)
    columns = len({round(axes.get_position().x0, 2) for axes in figure.axes})
    for axes in figure.axes:
        lines = axes.get_title().splitlines()
        axes.set_title("\n".join(fill(line, 60 // columns) for line in lines))
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    file, settings = BytesIO(), {"svg.fonttype": "none", "svg.hashsalt": "plot"}
    with rc_context(settings):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(rb"#(\w+)[)\"]", file.getvalue()))
    ids = [element.get("id", "") for element in root.iter()]
    ids = [name for name in ids if name.encode() in used]
    parts = repr((alt, [element.tag for element in root.iter()])).encode()
    names = {one: f"p{sha256(parts).hexdigest()[:8]}-{i}" for i, one in enumerate(ids)}
    inside = "".join(plot_element(child, names) for child in root)
    sheet.add(f'<g fill="{colour("ink")}" stroke-linejoin="round">{inside}</g>')
    if "<image" in inside or len(sheet.svg().encode()) > MOST:
        picture, sheet = BytesIO(), Bitmap(sheet.width, sheet.height, alt)
        figure.savefig(picture, format="png", dpi=144, metadata={"Software": None})
        sheet.add(picture.getvalue())
    pyplot.close(figure)
    return sheet
