"""The drawings of the book: inline SVG from the book's own tensors, one colour per role, moved by CSS alone."""

# Made from book/a_pictures.ipynb by tools/export.py; edit the chapter, not this file.
from contextlib import contextmanager
from hashlib import sha256
from html import escape
from math import ceil, hypot, inf
from unicodedata import east_asian_width

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
    """A drawing that cannot be made: an unknown role, a stretch of film that nobody would see."""


def colour(role: str) -> str:
    """The CSS colour of a role; "ink" is the colour of the text around the picture. Raises PictureError."""
    if role != "ink" and role not in ROLES:
        raise PictureError(f"no role {role!r}; there are ink, {', '.join(ROLES)}")
    return "currentColor" if role == "ink" else f"var(--{role})"


def palette(svg: str) -> str:
    """CSS that gives each role in `svg` its colour: the site's --draw-…, or ours mixed with the text's around it."""
    mixed = {
        role: f"color-mix(in srgb,{value} 60%,currentColor)"
        for role, value in ROLES.items()
    }
    return "".join(
        f"--{role}:var(--draw-{role},{mixed[role]});"
        for role in ROLES
        if colour(role) in svg
    )


CHAR = 9.1  # width of a monospaced character at 15 px
WIDTH = 440  # width of a picture that fills the page; at 80 % it fits on a phone


def show_token(token: str) -> str:
    """A token made visible: a space as ·, a line break as ↵, a tab as ⇥."""
    return str(token).translate({32: "·", 10: "↵", 9: "⇥", 13: "␍"})


def token_width(token: str) -> float:
    """The width of a token's box in pixels; a wide character, such as an emoji, takes two columns."""
    return 12 + CHAR * sum(
        2 if east_asian_width(character) in "WF" else 1
        for character in show_token(token)
    )


def heat(value: float, scale: float, role: str, most: float = 0.9) -> str:
    """SVG attributes of a cell: the role's colour for positive numbers, grey for negative; ±scale is the strongest."""
    strength = min(1.0, abs(value) / scale) if scale else 0.0
    opacity, role = 0.06 + (most - 0.06) * strength, role if value >= 0 else "untrained"
    return f'fill="{colour(role)}" fill-opacity="{opacity:.2f}"'


def stroke(role: str, line: float, dash: str = "") -> str:
    """SVG attributes of a line; dash is the lengths of its strokes and gaps."""
    return f'stroke="{colour(role)}" stroke-width="{line:g}"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


class Sheet:
    """A still drawing under construction. Units are pixels; text is at least 14 px at full size.

    alt: what it shows, in words, for those who do not see it. Raises PictureError when empty.
    """

    def __init__(self, width: float, height: float, alt: str):
        if not alt.strip():
            raise PictureError("a picture needs alt, its content in words")
        self.width, self.height, self.alt, self.parts = width, height, alt, []

    def add(self, svg: str) -> None:
        """Append raw SVG."""
        self.parts.append(svg)

    def rect(self, x, y, w, h, role="ink", fill=0.0, line=1.5, round=4, dash=""):
        """A rectangle with an outline; fill is the opacity of its inside."""
        inside = f'rx="{round}" fill="{colour(role)}" fill-opacity="{fill:g}"'
        place = f'x="{x:.5g}" y="{y:.5g}" width="{w:.5g}" height="{h:.5g}"'
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
        style = (
            "font-family:ui-monospace,Menlo,Consolas,monospace;" * mono
            + "white-space:pre"
        )
        look = f'fill="{colour(role)}" font-size="{size:g}" text-anchor="{anchor}" style="{style}"'
        look += (
            ' font-weight="600"' * bold
            + f' transform="rotate(-90 {x:.5g} {y:.5g})"' * upwards
        )
        self.add(f'<text x="{x:.5g}" y="{y:.5g}" {look}>{escape(str(words))}</text>')

    def line(self, x1, y1, x2, y2, role="ink", line=1.5, dash=""):
        """A straight line."""
        self.add(
            f'<path d="M{x1:.5g},{y1:.5g}L{x2:.5g},{y2:.5g}" {stroke(role, line, dash)}/>'
        )

    def arrow(self, x1, y1, x2, y2, role="ink", line=1.5):
        """A straight line with a head at its end."""
        ux, uy = (
            8 * way / max(1e-6, hypot(x2 - x1, y2 - y1)) for way in (x2 - x1, y2 - y1)
        )
        self.line(x1, y1, x2 - ux, y2 - uy, role, line)
        sides = f"l{-ux - uy / 2:.5g},{ux / 2 - uy:.5g}l{uy:.5g},{-ux:.5g}"
        self.add(f'<path d="M{x2:.5g},{y2:.5g}{sides}z" fill="{colour(role)}"/>')

    def token(self, x, y, token, role="input", width=None) -> float:
        """A token in its box, 26 px high; returns the box's width. What does not fit into `width` becomes …"""
        words, width = show_token(token), width or token_width(token)
        while len(words) > 1 and token_width(words) > width + 0.1:
            words = words[:-2] + "…"
        self.rect(x, y, width, 26, role, fill=0.12)
        self.text(x + width / 2, y + 18, words, role, size=15, mono=True)
        return width

    def cells(
        self, x, y, numbers, role="stream", cell=22, scale=None, values=False
    ) -> None:
        """A grid of coloured cells from a list of rows; with values=True each number is written in its cell."""
        rows = [[float(number) for number in row] for row in numbers]
        scale = float(
            scale or max((abs(number) for row in rows for number in row), default=1.0)
        )
        width, most = (46, 0.45) if values else (cell, 0.9)
        self.add('<g stroke="currentColor" stroke-opacity="0.25" stroke-width="0.6">')
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                place = f'x="{x + j * width:.5g}" y="{y + i * cell:.5g}" width="{width}" height="{cell}"'
                self.add(
                    f"<rect {place} {heat(number, scale, role, most)}><title>{number:.2g}</title></rect>"
                )
        self.add("</g>")
        for i, row in enumerate(rows if values else []):
            for j, number in enumerate(row):
                self.text(
                    x + (j + 0.5) * width, y + (i + 0.5) * cell + 5, f"{number:.2f}"
                )

    def svg(self, parts: list[str] | None = None, attributes: str = "") -> str:
        """The finished SVG. On a phone it shrinks to 80 %, then its box scrolls."""
        body, style = (
            "".join(parts or self.parts),
            f"max-width:100%;min-width:{0.8 * self.width:.0f}px;height:auto;",
        )
        attributes += f' viewBox="0 0 {self.width:.5g} {self.height:.5g}" width="{self.width:.5g}" role="img"'
        return f'<svg{attributes} aria-label="{escape(self.alt)}" style="{style}{palette(body)}">{body}</svg>'

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"

    def _repr_html_(self) -> str:
        return f'<div class="picture" style="overflow-x:auto">{self.svg()}</div>'


def keyframes(name: str, span: tuple, n_steps: int, seconds: float) -> str:
    """CSS that shows the class `name` during span = (start, stop, dx, dy) of n_steps; a step of rest follows."""
    (start, stop, dx, dy), at = (
        span,
        lambda step: f"{round(100 * step / (n_steps + 1), 3):g}%",
    )
    fade = min(0.15, (stop - start) / 3)
    frames = (
        f"0%,{at(start)}{{opacity:0}}{at(start + fade)}{{opacity:1}}"
        if start
        else "0%{opacity:1}"
    )
    frames += (
        f"{at(stop - fade)}{{opacity:1}}{at(stop)},100%{{opacity:0}}"
        if stop < n_steps
        else "100%{opacity:1}"
    )
    if dx or dy:
        away = f"{{transform:translate({dx:.0f}px,{dy:.0f}px)}}"
        frames += (
            f"0%,{at(start)}{away}{at(min(start + 0.7, stop))},100%{{transform:none}}"
        )
    return f"@keyframes {name}{{{frames}}}.{name}{{animation:{name} {(n_steps + 1) * seconds:g}s infinite}}"


class Picture(Sheet):
    """A sheet that may be a film; `seconds` is how long a step lasts. It stops under the pointer and in focus."""

    def __init__(self, width: float, height: float, alt: str, seconds: float = 1.0):
        super().__init__(width, height, alt)
        self.seconds, self.span = seconds, (0, inf)

    @contextmanager
    def during(self, start: float, stop: float | None = None, arrive=(0, 0)):
        """What is drawn inside is seen from step `start` until `stop`; without `stop`, to the end of the film.

        It glides to its place from `arrive` = (dx, dy) pixels away. Inside another `during` it is seen while both
        are. Raises PictureError when that is never.
        """
        outer, stop = self.span, inf if stop is None else stop
        self.span = start, stop = max(start, outer[0]), min(stop, outer[1])
        if start >= stop:
            raise PictureError(
                f"nothing can be seen from step {start:g} until step {stop:g}"
            )
        self.add((start, stop, *arrive))
        yield
        self.add("</g>")
        self.span = outer

    def svg(self) -> str:
        """The finished SVG. Without motion (a reader's setting, or paper) the last step stands still."""
        spans = list(
            dict.fromkeys(part for part in self.parts if isinstance(part, tuple))
        )
        if not spans:
            return super().svg()
        n_steps = ceil(
            max(start + 1 if stop == inf else stop for start, stop, *_ in spans)
        )
        name = (
            "p"
            + sha256(repr((self.parts, self.alt, self.seconds)).encode()).hexdigest()[
                :8
            ]
        )
        rules = [
            keyframes(f"{name}-{i}", span, n_steps, self.seconds)
            for i, span in enumerate(spans)
        ]
        rules.append(f".{name}:is(:hover,:focus) g{{animation-play-state:paused}}")
        style = f"<style>@media screen and (prefers-reduced-motion:no-preference){{{''.join(rules)}}}</style>"
        tags = {
            s: f'<g class="{name}-{i}" opacity="{int(s[1] >= n_steps)}">'
            for i, s in enumerate(spans)
        }
        return super().svg(
            [style, *(tags.get(part, part) for part in self.parts)],
            f' class="{name}" tabindex="0"',
        )


def wrap(
    strings, left=4.0, top=4.0, right=WIDTH - 4, row=34, widths=None
) -> tuple[list[tuple], float]:
    """Places (x, y, width) for tokens in lines from `left` to `right`, and the y below the last line."""
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


def tokens(
    strings: list[str],
    alt: str,
    roles: list[str] | str = "input",
    ids: list[int] | None = None,
) -> Picture:
    """A strip of tokens, wrapped to the page's width, with their ids below if given."""
    names = [] if ids is None else [str(int(i)) for i in ids]
    widths = [max(map(token_width, pair)) for pair in zip(strings, names)]
    places, bottom = wrap(strings, row=56 if names else 34, widths=widths)
    picture = Picture(
        max((x + width + 4 for x, _, width in places), default=8), bottom, alt
    )
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
):
    """A matrix of numbers as coloured cells; rows and columns are names, in the colour of the role `names`."""
    numbers, wide = (
        [[float(number) for number in row] for row in numbers],
        46 if values else cell,
    )
    left = 12 + max((token_width(row) - 12 for row in rows or []), default=-6)
    above = max((token_width(column) - 12 for column in columns or []), default=0)
    top, upwards = 12 + above if above > wide else 26 if columns else 6, above > wide
    picture = Picture(
        left + wide * max(map(len, numbers)) + 8, top + cell * len(numbers) + 8, alt
    )
    for j, column in enumerate(columns or []):
        x, anchor = (
            left + wide * (j + 0.5) + 5 * upwards,
            "start" if upwards else "middle",
        )
        picture.text(
            x,
            top - 7,
            show_token(column),
            names,
            15,
            anchor,
            mono=True,
            upwards=upwards,
        )
    for i, row in enumerate(rows or []):
        picture.text(
            left - 6,
            top + cell * (i + 0.5) + 5,
            show_token(row),
            names,
            15,
            "end",
            mono=True,
        )
    picture.cells(left, top, numbers, role, cell, scale, values)
    return picture


def attention_map(weights, strings: list[str], alt: str, cell=30) -> Picture:
    """A (T, T) matrix of attention weights: a row looks at its columns; what the mask forbids stays empty."""
    allowed = [row[: i + 1] for i, row in enumerate(weights)]
    return matrix(
        allowed, alt, "stream", strings, strings, cell=cell, scale=1.0, names="input"
    )


def plot_style() -> None:
    """Set matplotlib to the book's look: transparent ground, grey text and axes, small and sharp."""
    from matplotlib import (
        pyplot,
    )  # here, because the library itself needs no matplotlib

    look = {
        "figure.figsize": (6, 3),
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "font.size": 10,
        "legend.frameon": False,
    }
    grey = [
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
    ]
    clear = ["figure.facecolor", "axes.facecolor", "savefig.facecolor"]
    pyplot.rcParams.update(
        look | dict.fromkeys(grey, "#888888") | dict.fromkeys(clear, "none")
    )


def model_box(
    picture: Picture, y: float, words: str, role="trained", x=70.0, width=300.0
) -> None:
    """A model as a box 46 px high."""
    picture.rect(x, y, width, 46, role, fill=0.12, line=2.5, round=10)
    picture.text(x + width / 2, y + 28, words, role, size=16, bold=True)


def feed(
    picture: Picture,
    strings,
    places,
    y: float,
    step: float,
    role="input",
    middle=WIDTH / 2,
) -> None:
    """A copy of the tokens sinks, within a step, into a model whose box is at y, with this middle."""
    for string, (x, line, width) in zip(strings, places):
        left = max(4, middle - width / 2)
        with picture.during(step, step + 0.8, arrive=(x - left, line - y - 10)):
            picture.token(left, y + 10, string, role, width)


def speaking(prompt, output, alt: str) -> Picture:
    """A prompt's tokens go into the trained model, and text comes out (the article's first picture)."""
    heard, y = wrap(prompt, top=30)
    said, bottom = wrap(output, top=y + 116)
    picture = Picture(WIDTH, bottom, alt, seconds=0.8)
    picture.text(4, 18, "prompt", anchor="start")
    picture.text(4, y + 104, "output", anchor="start")
    token_row(picture, prompt, heard)
    feed(picture, prompt, heard, y + 14, step=1)
    for i, (string, (x, line, width)) in enumerate(zip(output, said)):
        with picture.during(
            2 + i * min(12, len(said)) // len(said),
            arrive=((WIDTH - width) / 2 - x, y + 24 - line),
        ):
            picture.token(x, line, string, "output", width)
    model_box(picture, y + 14, "trained model")
    return picture


def sliding(strings, first: int, count: int, alt: str) -> Picture:
    """Training examples from one text (third picture): a window of `first` tokens grows; the next one is the label."""
    places, y = wrap(strings[: first + count], left=34, top=0)[0], 30
    picture = Picture(WIDTH, y, alt)
    picture.text(34, 18, "features", "input", anchor="start")
    picture.text(114, 18, "label", "label", anchor="start")
    for end in range(first, len(places)):
        picture.text(14, y + 18, end - first + 1)
        shifted = [(x, y + line, width) for x, line, width in places[: end + 1]]
        token_row(picture, strings, shifted, ["input"] * end + ["label"])
        y = picture.height = shifted[-1][1] + 40
    return picture


def guess_list(picture: Picture, x, y, width, guesses, full: float, label=None) -> None:
    """Guesses (token, probability) as bars, the label's in violet; the probability `full` is as long as fits."""
    column = min(0.45 * width, max(token_width(token) for token, _ in guesses))
    for token, chance in guesses:
        role, long = (
            "label" if token == label else "output",
            max(1.0, (width - column - 60) * float(chance) / full),
        )
        picture.token(x, y, token, role, column)
        picture.rect(x + column + 6, y + 4, long, 18, role, fill=0.5, line=0, round=2)
        picture.text(
            x + column + 11 + long, y + 18, f"{float(chance):.1%}", anchor="start"
        )
        y += 32


def training_step(features, before, label: str, after, alt: str) -> Picture:
    """Predict, compare, update (fourth picture); before and after are lists of (token, probability)."""
    places, y = wrap(features, top=30)
    full = max(float(chance) for _, chance in [*before, *after]) or 1.0
    picture = Picture(
        WIDTH, y + 116 + 32 * max(len(before), len(after)), alt, seconds=1.2
    )
    picture.text(4, 18, "features", anchor="start")
    token_row(picture, features, places)
    cases = (
        (1, 0, 5, 4, "untrained", "before", before),
        (5, 5, None, 228, "trained", "after the update", after),
    )
    for fed, start, stop, x, role, words, guesses in cases:
        feed(picture, features, places, y + 14, fed, middle=104)
        with picture.during(start, stop):
            model_box(picture, y + 14, "model", role, 4, 200)
        with picture.during(fed + 1):
            picture.text(x, y + 104, f"guesses {words}", role, anchor="start")
            guess_list(picture, x, y + 114, 208, guesses, full, label)
    with picture.during(3):
        picture.text(270, y + 22, "right answer", "label", anchor="start")
        picture.token(270, y + 28, label, "label", min(token_width(label), 160))
    with picture.during(4):
        picture.arrow(262, y + 41, 208, y + 41, "label", 2.5)
        picture.text(270, y + 72, "error: update", "label", anchor="start")
    return picture


def one_at_a_time(prompt, output, alt: str) -> Picture:
    """The model makes one token at a time, and each is fed back (fifth picture)."""
    places, y = wrap([*prompt, *output], top=30)
    picture = Picture(WIDTH, y + 108, alt, seconds=min(1.0, 12 / max(1, len(output))))
    picture.text(4, 18, "the prompt, and what has been said so far", anchor="start")
    token_row(picture, prompt, places)
    feed(picture, prompt, places, y + 14, step=0)
    for i, (string, (x, line, width)) in enumerate(zip(output, places[len(prompt) :])):
        with picture.during(
            2 * i + 0.8, 2 * i + 1.3 if i + 1 < len(output) else None, arrive=(0, -50)
        ):
            picture.token((WIDTH - width) / 2, y + 74, string, "output", width)
        with picture.during(
            2 * i + 1.3, arrive=((WIDTH - width) / 2 - x, y + 74 - line)
        ):
            picture.token(x, line, string, "output", width)
        feed(picture, [string], [(x, line, width)], y + 14, 2 * i + 2, "output")
    model_box(picture, y + 14, "trained model")
    return picture


def parameters(before: dict, after: dict, alt: str) -> Picture:
    """Corners of matrices, random before training and right after (sixth picture): dicts name -> 2-D tensor."""
    picture = Picture(WIDTH, 30 + 130 * len(before), alt)
    picture.text(4, 18, "before training", "untrained", anchor="start")
    picture.text(226, 18, "after training", "trained", anchor="start")
    for name, y in zip(before, range(30, 30 + 130 * len(before), 130)):
        corners = [
            [[abs(float(n)) for n in row[:12]] for row in numbers[name][:6]]
            for numbers in (before, after)
        ]
        scale = max(number for corner in corners for row in corner for number in row)
        for x, role, corner in zip((4, 226), ("untrained", "trained"), corners):
            picture.cells(x + 5, y + 5, corner, role, 14, scale)
            picture.rect(
                x, y, 14 * len(corner[0]) + 10, 14 * len(corner) + 10, "weight", line=2
            )
        picture.text(
            4,
            y + 14 * len(corner) + 28,
            f"{name}: {' × '.join(map(str, after[name].shape))}",
            anchor="start",
        )
    return picture


def tracks(strings, n_ctx: int, alt: str) -> Picture:
    """The context window (seventh picture): n_ctx tracks side by side, one token on each, all moving at once."""
    shown = [*range(len(strings))][:8] + (
        [None, n_ctx - 1] if n_ctx > min(8, len(strings)) else []
    )
    column, right, high = (
        min(130, max(map(token_width, strings))),
        WIDTH - 56,
        34 * len(shown),
    )
    picture = Picture(WIDTH, high + 34, alt, seconds=2.0)
    for y, track in zip(range(30, 30 + high, 34), shown):
        picture.text(
            44, y + 18, "⋮" if track is None else f"{track + 1:,}", anchor="end"
        )
        if track in range(len(strings)):
            picture.token(52, y, strings[track], "input", column)
            picture.line(column + 54, y + 13, WIDTH - 6, y + 13, "stream", 2)
            with picture.during(0, 1, arrive=(column + 44 - right, 0)):
                picture.rect(right + 12, y + 5, 28, 16, "stream", fill=0.7)
        elif track:
            picture.line(52, y + 13, WIDTH - 6, y + 13, "untrained", 1.5, "4 4")
    picture.text(
        (column + 74 + right) / 2, 18, f"a window of {n_ctx:,} tracks", "trained"
    )
    picture.rect(
        column + 74,
        26,
        right - column - 74,
        high,
        "trained",
        fill=0.1,
        line=2.5,
        round=10,
    )
    return picture


def word_vector_word(word: str, vector_in, vector_out, guesses, alt: str) -> Picture:
    """A word becomes a vector, the vector a prediction, the prediction a word (eighth picture)."""
    picture, width = (
        Picture(WIDTH, 276 + 32 * len(guesses), alt, seconds=1.2),
        min(token_width(word), 264),
    )
    picture.token(154 - width / 2, 6, word, "input", width)
    with picture.during(2):
        model_box(picture, 128, "the layers", x=22, width=264)
    arrows = (
        (1, 36, "1  word to vector"),
        (2, 98, "2  compute"),
        (3, 178, "result"),
        (4, 236, "3  vector to word"),
    )
    for step, y, words in arrows:
        with picture.during(step):
            picture.arrow(154, y, 154, y + 27)
            picture.text(170, y + 18, words, anchor="start")
    for step, y, vector in ((1, 68, vector_in), (3, 208, vector_out)):
        with picture.during(step, arrive=(0, -36)):
            picture.cells(22, y, [vector[:12]], "stream", 22)
            picture.text(296, y + 16, f"… {len(vector):,} numbers", anchor="start")
    with picture.during(4, arrive=(0, -36)):
        guess_list(
            picture,
            22,
            270,
            WIDTH - 30,
            guesses,
            max(float(chance) for _, chance in guesses) or 1.0,
        )
    return picture
