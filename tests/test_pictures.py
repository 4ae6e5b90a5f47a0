"""The drawings, read back: what the SVG says against what was asked, with an evaluation of its CSS of our own."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import pictures
from gpt3lib.pictures import ROLES, Picture, PictureError, show_token, token_width

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
NASTY = ["<b>", "&amp;", '"', "'", "\n", " a\tb", "法", "🙂", "]]>", "--", "\r"]
PROMPT = ["Rec", "ite", " the", " first", " law"]
ANSWER = ["A", " robot", " may"]
VECTOR = torch.linspace(-1, 1, 128)
NOISE = {"wte": torch.linspace(-0.1, 0.1, 4353 * 16).reshape(4353, 16), "w": torch.full((3, 4), 0.05)}
BEFORE, AFTER = [(" the", 0.2), (" law", 0.1)], [(" law", torch.tensor(0.4)), (" of", 0.1)]
LONG = [" to", " be", " or", " supercalifragilistic" * 4] * 12

DRAWINGS = {
    "tokens": lambda strings, alt: pictures.tokens(strings, alt, ids=torch.arange(len(strings))),
    "matrix": lambda strings, alt: pictures.matrix(torch.ones(len(strings), 2), alt, rows=strings, columns=["x", "yy"]),
    "values": lambda strings, alt: pictures.matrix([[0.5, -1]], alt, columns=strings[:2], values=True),
    "attention_map": lambda strings, alt: pictures.attention_map(torch.ones(len(strings), len(strings)), strings, alt),
    "speaking": lambda strings, alt: pictures.speaking(strings, strings[::-1], alt),
    "sliding": lambda strings, alt: pictures.sliding([*strings, *strings], len(strings), 3, alt),
    "training_step": lambda strings, alt: pictures.training_step(
        strings, [(string, 0.3) for string in dict.fromkeys(strings)], strings[0], AFTER, alt
    ),
    "one_at_a_time": lambda strings, alt: pictures.one_at_a_time(strings, strings[:4], alt),
    "parameters": lambda strings, alt: pictures.parameters(NOISE, {name: -2 * x for name, x in NOISE.items()}, alt),
    "tracks": lambda strings, alt: pictures.tracks(strings, 2048, alt),
    "word_vector_word": lambda strings, alt: pictures.word_vector_word(strings[0], VECTOR, -VECTOR, AFTER, alt),
}
calm = settings(deadline=None, max_examples=60)  # on a busy machine too
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


# --- reading a drawing back ---


def parse(picture):
    """The SVG as an XML tree; fails when it is not well formed."""
    return ElementTree.fromstring(picture.svg())


def walk(element, path=()):
    """Every element with the groups around it."""
    for child in element:
        yield child, path
        yield from walk(child, (*path, child))


def films(root):
    """Class -> {property: [(percent, value)]}, and class -> seconds, from the style sheet of a drawing."""
    style = root.find("style")
    if style is None:
        return {}, {}
    media, rules = re.fullmatch(r"@media ([^{]*)\{(.*)\}", style.text).groups()
    assert media == "screen and (prefers-reduced-motion:no-preference)"
    frames = {}
    for name, body in re.findall(r"@keyframes (\S+?)\{((?:[^{}]*\{[^{}]*\})*)\}", rules):
        for selector, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", body):
            key, value = declarations.split(":")
            for percent in selector.split(","):
                frames.setdefault(name, {}).setdefault(key, []).append((float(percent.rstrip("%")), value))
    seconds = {name: float(time) for name, time in re.findall(r"\.(\S+?)\{animation:\1 ([\d.]+)s infinite\}", rules)}
    assert frames.keys() == seconds.keys()
    return frames, seconds


def at(points, percent, number):
    """The value of a property at a percentage: straight lines between the points."""
    points = sorted(points)
    assert points[0][0] == 0 and points[-1][0] == 100
    for (a, low), (b, high) in zip(points, points[1:]):
        if a <= percent <= b:
            low, high = number(low), number(high)
            return low if a == b else low + (high - low) * (percent - a) / (b - a)
    raise AssertionError


def shift(value):
    """The complex number of a translation."""
    if value == "none":
        return 0
    x, y = re.fullmatch(r"translate\((-?\d+)px,(-?\d+)px\)", value).groups()
    return complex(float(x), float(y))


def opacity(frames, path, percent):
    """How visible something is inside its groups at a percentage of the film."""
    product = 1.0
    for group in path:
        if group.get("class") in frames:
            product *= at(frames[group.get("class")]["opacity"], percent, float)
    return product


def texts(picture, step=None):
    """(text, fill) of what is seen in the middle of a step; without a step, of what a reader without motion sees."""
    root = parse(picture)
    frames, seconds = films(root)
    length = next(iter(seconds.values()), 1) / picture.seconds
    found = []
    for element, path in walk(root):
        if element.tag == "text":
            seen = all(group.get("opacity", "1") == "1" for group in path)
            if step is not None:
                seen = opacity(frames, path, 100 * (step + 0.5) / length) > 0.5
            found += [(element.text, element.get("fill"))] * seen
    return found


def ink(role):
    return f"var(--{role})"


def of_role(shown, role):
    return [text for text, fill in shown if fill == ink(role)]


# --- every drawing ---


@every_drawing
@pytest.mark.parametrize("strings", [PROMPT, ["a"], NASTY, LONG], ids=["prompt", "one", "nasty", "long"])
def test_a_drawing_is_well_formed_and_stays_inside_its_frame(name, strings):
    picture = DRAWINGS[name](strings, "words")
    root = parse(picture)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert width <= (560 if name not in ("attention_map", "matrix", "values") else 1e9)
    assert float(root.get("width")) == pytest.approx(width)
    for element, _ in walk(root):
        if element.tag == "rect":
            x, y, w, h = (float(element.get(key)) for key in ("x", "y", "width", "height"))
            assert x >= -0.01 and x + w <= width + 0.01 and y >= -0.01 and y + h <= height + 0.01
        if element.tag == "text":
            size = float(element.get("font-size"))
            assert size >= 14
            x, y, anchor = float(element.get("x")), float(element.get("y")), element.get("text-anchor")
            long = size * 0.61 * (token_width(element.text or "") - 12) / 9.1
            if "monospace" in element.get("style"):
                left = {"start": 0, "middle": long / 2, "end": long}[anchor]
                if element.get("transform"):
                    assert y + left - long >= -1 and y <= height
                else:
                    assert x - left >= -1 and x - left + long <= width + 1
            assert 10 <= y <= height - 2


@every_drawing
def test_the_words_for_those_who_do_not_see_it(name):
    alt = 'A "picture" of <tokens> & numbers, it\'s small'
    picture = DRAWINGS[name](PROMPT, alt)
    root = parse(picture)
    assert root.get("role") == "img" and root.get("aria-label") == alt
    assert repr(picture) == f"Picture: {alt}"
    assert picture._repr_html_() == f'<div class="picture" style="overflow-x:auto">{picture.svg()}</div>'


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_picture_without_words_is_refused(alt):
    with pytest.raises(PictureError, match="needs alt"):
        Picture(10, 10, alt)


@every_drawing
def test_the_same_drawing_is_the_same_text_and_another_has_other_names(name):
    one, again, other = DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "y")
    assert one.svg() == again.svg() == one.svg()
    assert not set(films(parse(one))[0]) & set(films(parse(other))[0])


@every_drawing
def test_each_role_that_is_used_has_a_colour_and_no_other(name):
    root = parse(DRAWINGS[name](PROMPT, "x"))
    used = set()
    for element, _ in walk(root):
        for key in ("fill", "stroke"):
            used.update(re.findall(r"var\(--(\w+)\)", element.get(key, "")))
    rule = r"--(\w+):var\(--draw-(\w+),color-mix\(in srgb,(#\w{6}) \d+%,currentColor\)\);"
    rules = re.findall(rule, root.get("style"))
    assert used and {role for role, _, _ in rules} == used
    assert all(role == site and ROLES[role] == value for role, site, value in rules)


@every_drawing
def test_a_drawing_shrinks_a_little_and_then_scrolls(name):
    picture = DRAWINGS[name](PROMPT, "x")
    least = float(re.search(r"min-width:(\d+)px", picture.svg()).group(1))
    assert least == pytest.approx(0.8 * picture.width, abs=0.6)
    assert "max-width:100%" in picture.svg() and "height:auto" in picture.svg()


# --- colours ---


def linear(channel):
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def luminance(rgb):
    return sum(weight * linear(channel) for weight, channel in zip((0.2126, 0.7152, 0.0722), rgb))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def mixed(one, other, part):
    return [part * a + (1 - part) * b for a, b in zip(one, other)]


def site_colours(selector):
    css = (ROOT / "book" / "_static" / "pictures.css").read_text()
    block = re.search(rf"^ *{re.escape(selector)} \{{(.*?)\}}", css, re.MULTILINE | re.DOTALL).group(1)
    return {role: rgb(value) for role, value in re.findall(r"--draw-(\w+): (#\w{6});", block) if role in ROLES}


LIGHT, DARK = rgb("#ffffff"), rgb("#121212")
INKS = {"site": (LIGHT, "#222832"), "lab": (LIGHT, "#212121"), "dark": (DARK, "#ced6dd"), "dark lab": (DARK, "#dedede")}


@pytest.mark.parametrize("place", INKS)
def test_mixed_colours_can_be_read_also_on_their_own_tint(place):
    page, text = INKS[place]
    part = float(re.search(r"(\d+)%,currentColor", pictures.palette(ink("input"))).group(1)) / 100
    tint = float(re.search(r'fill-opacity="([\d.]+)"', pictures.tokens(["a"], "x").svg()).group(1))
    for value in ROLES.values():
        colour = mixed(rgb(value), rgb(text), part)
        assert contrast(colour, page) >= 4.5
        assert contrast(colour, mixed(colour, page, tint)) >= 4.5


@pytest.mark.parametrize("selector, page", [("html", LIGHT), ('html[data-theme="dark"]', DARK)])
def test_the_colours_of_the_site_can_be_read_also_on_their_own_tint(selector, page):
    colours = site_colours(selector)
    assert colours.keys() == ROLES.keys()
    for colour in colours.values():
        assert contrast(colour, page) >= 4.5
        assert contrast(colour, mixed(colour, page, 0.12)) >= 4.5


@pytest.mark.parametrize("place", INKS)
def test_numbers_in_cells_can_be_read(place):
    page, text = INKS[place]
    svg = pictures.matrix([[1.0, -1.0]], "x", values=True).svg()
    strongest = max(map(float, re.findall(r'fill-opacity="([\d.]+)"', svg)))
    for value in ROLES.values():
        ground = mixed(mixed(rgb(value), rgb(text), 0.6), page, strongest)
        assert contrast(rgb(text), ground) >= 4.5


def test_an_unknown_role_is_refused():
    with pytest.raises(PictureError, match="no role 'green'; there are ink, input, output"):
        pictures.colour("green")
    with pytest.raises(PictureError, match="no role 'red'"):
        pictures.tokens(["a"], "x", roles=["red"])
    assert pictures.colour("ink") == "currentColor"


# --- strokes ---


@calm
@given(*[st.floats(0, 400)] * 4)
def test_an_arrow_ends_where_it_should(x1, y1, x2, y2):
    picture = Picture(400, 400, "x")
    picture.arrow(x1, y1, x2, y2, "label", line=2)
    line, head = parse(picture)
    ax, ay, bx, by = map(float, re.fullmatch(r"M(.+),(.+)L(.+),(.+)", line.get("d")).groups())
    tx, ty, *sides = map(float, re.fullmatch(r"M(.+),(.+)l(.+),(.+)l(.+),(.+)z", head.get("d")).groups())
    start, tip, base = complex(x1, y1), complex(x2, y2), complex(bx, by)
    assert abs(complex(ax, ay) - start) < 0.1 and abs(complex(tx, ty) - tip) < 0.1
    one = complex(tx, ty) + complex(*sides[:2])
    other = one + complex(*sides[2:])
    if abs(tip - start) > 1:
        assert abs(base - tip) == pytest.approx(8, abs=0.2)
        assert abs((one + other) / 2 - base) < 0.2 and abs(one - other) == pytest.approx(8, abs=0.2)
        towards = (tip - base) / (tip - start)
        assert abs(towards.imag) < 0.15 * abs(towards) + 0.05 and towards.real > 0


def test_strokes_have_the_looks_that_were_asked_for():
    picture = Picture(100, 100, "x")
    picture.rect(1, 2, 30, 40, "label", fill=0.5, line=3, round=7, dash="4 2")
    picture.line(0, 0, 5, 5, "weight", dash="1 1")
    picture.text(3, 20, "a & b", "stream", size=20, anchor="end", bold=True, upwards=True)
    rect, line, text = parse(picture)
    assert [rect.get(key) for key in ("x", "y", "width", "height", "rx")] == ["1", "2", "30", "40", "7"]
    assert [rect.get(key) for key in ("fill", "fill-opacity", "stroke-width")] == [ink("label"), "0.5", "3"]
    assert (rect.get("stroke"), rect.get("stroke-dasharray")) == (ink("label"), "4 2")
    assert (line.get("stroke"), line.get("stroke-dasharray")) == (ink("weight"), "1 1")
    assert text.text == "a & b" and text.get("transform") == "rotate(-90 3 20)"
    assert (text.get("font-size"), text.get("text-anchor"), text.get("font-weight")) == ("20", "end", "600")


# --- tokens and numbers ---


def test_invisible_characters_become_visible():
    assert show_token(" a b\n\t") == "·a·b↵⇥"
    assert show_token(7) == "7"


def test_a_wide_character_takes_two_columns():
    assert token_width("ab") - token_width("a") == pytest.approx(9.1)
    assert token_width("法") == token_width("🙂") == token_width("ab")


@calm
@given(st.text(max_size=40), st.floats(22, 200))
def test_a_token_fits_into_its_box(string, width):
    picture = Picture(300, 40, "x")
    assert picture.token(4, 4, string, "input", width) == width
    rect, text = picture.parts
    assert f'width="{width:.5g}"' in rect
    shown = re.search(r">(.*)</text>", text, re.DOTALL).group(1)
    assert len(shown) >= (1 if string else 0)
    drawn = ElementTree.fromstring(text).text or "" if string.isprintable() else ""
    if len(drawn) > 1:
        assert token_width(drawn) <= width + 0.2
    if string.isprintable() and token_width(string) <= width:
        assert drawn == show_token(string)
    elif len(drawn) > 1:
        assert drawn.endswith("…") and show_token(string).startswith(drawn[:-1])


@pytest.mark.parametrize("columns, drawn", [(10, "abcdefghij"), (9, "abcdefgh…"), (5, "abcd…"), (2, "a…"), (1, "…")])
def test_a_token_too_long_for_its_box_is_cut_at_its_end(columns, drawn):
    picture = Picture(300, 40, "x")
    picture.token(4, 4, "abcdefghij", width=token_width("x" * columns))
    assert texts(picture) == [(drawn, ink("input"))]


@calm
@given(st.lists(st.text(min_size=1, max_size=70), max_size=30))
def test_wrapped_tokens_stay_inside_and_do_not_touch(strings):
    places, bottom = pictures.wrap(strings, left=10, top=5, right=300, row=40)
    assert len(places) == len(strings)
    for (x, y, width), string in zip(places, strings):
        assert x >= 10 and x + width <= 300.001 and (y - 5) % 40 == 0 and y + 40 <= bottom
        assert width == pytest.approx(min(290, token_width(string)))
    for (x, y, width), (next_x, next_y, next_width) in zip(places, places[1:]):
        if next_y == y:
            assert next_x == pytest.approx(x + width + 4)
        else:  # a new line begins only when it must
            assert next_y == y + 40 and next_x == 10 and x + width + 4 + next_width > 300


def test_tokens_have_their_roles_and_their_ids():
    picture = pictures.tokens(["a", " b", "c"], "x", roles=["input", "output", "label"], ids=[5, 66, 777])
    shown = texts(picture)
    assert [shown[i] for i in range(3)] == [("a", ink("input")), ("·b", ink("output")), ("c", ink("label"))]
    assert [text for text, fill in shown if fill == "currentColor"] == ["5", "66", "777"]
    assert len(texts(pictures.tokens(["a", "b"], "x"))) == 2
    assert texts(pictures.tokens(["a"], "x", ids=torch.tensor([3])))[1][0] == "3"
    assert parse(pictures.tokens([], "nothing")).tag == "svg"


def cells(picture):
    """(x, y, number in the title, fill, opacity) of every cell."""
    found = []
    for element, _ in walk(parse(picture)):
        title = element.find("title")
        if title is not None:
            x, y, strength = (float(element.get(key)) for key in ("x", "y", "fill-opacity"))
            found.append((x, y, float(title.text), element.get("fill"), strength))
    return found


@calm
@given(st.floats(-10, 10), st.floats(0.01, 10))
def test_heat_says_sign_and_size(value, scale):
    fill, strength = re.fullmatch(r'fill="(.*)" fill-opacity="(.*)"', pictures.heat(value, scale, "stream")).groups()
    assert fill == ink("stream" if value >= 0 else "untrained")
    assert float(strength) == pytest.approx(0.06 + 0.84 * min(1, abs(value) / scale), abs=0.0051)
    assert 'opacity="0.06"' in pictures.heat(3.0, 0.0, "stream")


def test_a_matrix_has_its_numbers_in_their_places():
    numbers = torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, -1.0]])
    found = cells(pictures.matrix(numbers, "x", rows=["a", " bb"], columns=["x", "y", "z"], cell=20))
    assert [cell[2] for cell in found] == numbers.flatten().tolist()
    left, top = found[0][:2]
    assert [(x - left, y - top) for x, y, *_ in found] == [(20 * j, 20 * i) for i in range(2) for j in range(3)]
    assert [fill == ink("weight") for *_, fill, _ in found] == [number >= 0 for number in numbers.flatten()]
    assert [strength for *_, strength in found] == [
        pytest.approx(0.06 + 0.84 * abs(number) / 4, abs=0.0051) for number in numbers.flatten().tolist()
    ]
    assert left >= 2 * 9.1 + 6


def test_numbers_are_written_into_their_cells():
    picture = pictures.matrix([[0.125, -3.0]], "x", values=True)
    assert [text for text, _ in texts(picture)] == ["0.12", "-3.00"]
    (x1, *_), (x2, *_) = cells(picture)
    assert x2 - x1 == 46


def test_the_scale_of_a_grid_can_be_given_as_a_tensor():
    picture = Picture(100, 40, "x")
    picture.cells(0, 0, torch.tensor([[1.0, 2.0]]), "stream", scale=torch.tensor(4.0))
    assert [strength for *_, strength in cells(picture)] == [0.27, 0.48]


def test_names_wider_than_a_cell_are_written_upwards():
    def turned(picture):
        return [element.get("transform") is not None for element, _ in walk(parse(picture)) if element.tag == "text"]

    assert turned(pictures.matrix([[1, 2]], "x", columns=["a", "bb"])) == [False, False]
    assert turned(pictures.matrix([[1, 2]], "x", columns=["a", "long"], rows=["r"])) == [True, True, False]


@pytest.mark.parametrize("T", [1, 2, 7])
def test_an_attention_map_has_nothing_above_the_diagonal(T):
    weights = torch.rand(T, T, generator=torch.Generator().manual_seed(T))
    found = cells(pictures.attention_map(weights, [f"t{i}" for i in range(T)], "x", cell=30))
    left, top = found[0][:2]
    places = {(round((y - top) / 30), round((x - left) / 30)): rest for x, y, *rest in found}
    assert places.keys() == {(i, j) for i in range(T) for j in range(i + 1)} and len(found) == T * (T + 1) // 2
    for (i, j), (number, _, strength) in places.items():
        assert number == pytest.approx(weights[i, j].item(), rel=0.06)
        assert strength == pytest.approx(0.06 + 0.84 * weights[i, j].item(), abs=0.0051)


def test_the_names_of_an_attention_map_stand_at_their_rows_and_columns():
    strings = ["one", " two", " three"]
    picture = pictures.attention_map(torch.ones(3, 3), strings, "x", cell=30)
    found = cells(picture)
    rows = {y for _, y, *_ in found}
    names = [element for element, _ in walk(parse(picture)) if element.tag == "text"]
    across = [name for name in names if name.get("transform")]
    down = [name for name in names if not name.get("transform")]
    assert [name.text for name in across] == [name.text for name in down] == [show_token(s) for s in strings]
    assert all(row < float(name.get("y")) < row + 30 for row, name in zip(sorted(rows), down))
    columns = sorted({x for x, *_ in found})
    assert all(column < float(name.get("x")) < column + 30 for column, name in zip(columns, across))
    assert all(name.get("fill") == ink("input") for name in names)


# --- films ---

spans = st.tuples(st.integers(0, 8), st.one_of(st.none(), st.integers(1, 6)))


def drawn(spans, seconds=1.0):
    """A film with the word i during the i-th span (start, length)."""
    picture = Picture(100, 30, "x", seconds)
    for i, (start, length) in enumerate(spans):
        with picture.during(start, None if length is None else start + length):
            picture.text(5, 20, str(i))
    return picture


@calm
@given(st.lists(spans, min_size=1, max_size=6))
def test_during_each_step_what_was_asked_for_is_seen(asked):
    n_steps = max(start + (length or 1) for start, length in asked)
    picture = drawn(asked)
    for step in range(n_steps + 1):  # the last one is the rest: the last image stands
        now = min(step, n_steps - 1)
        wanted = [i for i, (start, length) in enumerate(asked) if start <= now < start + (length or 99)]
        assert [int(text) for text, _ in texts(picture, step)] == wanted
    assert texts(picture) == texts(picture, n_steps - 1)  # without motion: the last step


@calm
@given(spans, spans)
def test_a_span_inside_a_span_is_seen_during_both(outer, inner):
    picture = Picture(100, 30, "x")
    ends = [start + (length or 99) for start, length in (outer, inner)]
    first, last = max(outer[0], inner[0]), min(ends)
    with picture.during(outer[0], outer[1] and ends[0]):
        picture.text(5, 20, "outer")
        if first >= last:
            with pytest.raises(PictureError, match=f"from step {first} until step {last}"):
                picture.during(inner[0], inner[1] and ends[1]).__enter__()
            return
        with picture.during(inner[0], inner[1] and ends[1]):
            picture.text(5, 20, "inner")
        picture.text(5, 20, "again")
    n_steps = max(outer[0] + (outer[1] or 1), first + 1 if last > 90 else last)
    for step in range(n_steps):
        around = outer[0] <= step < ends[0]
        wanted = ["outer"] * around + ["inner"] * (first <= step < last) + ["again"] * around
        assert [text for text, _ in texts(picture, step)] == wanted


@pytest.mark.parametrize("start, stop", [(2, 2), (3, 1)])
def test_a_span_that_nobody_sees_is_refused(start, stop):
    picture = Picture(10, 10, "x")
    message = f"nothing can be seen from step {start} until step {stop}"
    with pytest.raises(PictureError, match=message), picture.during(start, stop):
        pass


def test_a_film_lasts_its_steps_and_one_of_rest():
    _, seconds = films(parse(drawn([(0, 2), (3, None)], seconds=1.5)))
    assert set(seconds.values()) == {(4 + 1) * 1.5}
    _, seconds = films(parse(drawn([(0, 0.5), (1, 1.2)])))
    assert set(seconds.values()) == {3 + 1}


def test_what_arrives_glides_from_afar_to_its_place():
    picture = drawn([(0, None), (3, None)])
    with picture.during(1, 3, arrive=(-60, 25)):
        picture.text(5, 20, "moves")
    frames, _ = films(parse(picture))
    moving = [properties["transform"] for properties in frames.values() if "transform" in properties]
    assert len(moving) == 1
    place = [at(moving[0], 100 * step / 5, shift) for step in (0, 1, 1.35, 1.7, 2.5, 5)]
    assert place[:2] == [-60 + 25j, -60 + 25j] and place[3:] == [0, 0, 0]
    assert abs(place[2] - (-30 + 12.5j)) < 0.1


def test_a_film_stops_under_the_pointer_and_in_focus():
    root = parse(drawn([(0, 1), (1, None)]))
    name = root.get("class")
    assert root.get("tabindex") == "0"
    assert f".{name}:is(:hover,:focus) g{{animation-play-state:paused}}" in root.find("style").text
    still = parse(pictures.tokens(["a"], "x"))
    assert still.get("tabindex") is still.get("class") is still.find("style") is None


def test_a_still_picture_needs_no_rules():
    assert [name for name in DRAWINGS if films(parse(DRAWINGS[name](PROMPT, "x")))[0]] == [
        "speaking",
        "training_step",
        "one_at_a_time",
        "tracks",
        "word_vector_word",
    ]


# --- the article's pictures ---


def n_steps(picture):
    _, seconds = films(parse(picture))
    return round(next(iter(seconds.values())) / picture.seconds) - 1


def shown(strings):
    return [show_token(string) for string in strings]


def test_speaking_shows_the_prompt_then_the_answer():
    picture = pictures.speaking(PROMPT, ANSWER, "x")
    assert of_role(texts(picture, 0), "output") == []
    assert of_role(texts(picture, 0), "input") == shown(PROMPT)
    for i in range(3):
        assert of_role(texts(picture, 2 + i), "output") == shown(ANSWER[: i + 1])
    assert of_role(texts(picture), "input") == shown(PROMPT) and of_role(texts(picture), "output") == shown(ANSWER)
    assert of_role(texts(picture), "trained") == ["trained model"]


def test_a_long_answer_is_spoken_in_few_steps():
    picture = pictures.speaking(PROMPT, LONG, "x")
    assert n_steps(picture) == 2 + 12
    assert len(of_role(texts(picture), "output")) == len(LONG)
    assert len(of_role(texts(picture, 2), "output")) == len(LONG) / 12


def test_sliding_has_one_label_more_to_the_right_in_each_row():
    words = [f"w{i}" for i in range(12)]
    picture = pictures.sliding(words, 4, 3, "x")
    places = {}
    for element, _ in walk(parse(picture)):
        if element.tag == "text" and element.text.startswith("w"):
            places.setdefault(element.get("y"), []).append((element.text, element.get("fill"), element.get("x")))
    rows = list(places.values())
    for row, end in zip(rows, (4, 5, 6)):
        assert [(text, fill) for text, fill, _ in row[:-1]] == [(word, ink("input")) for word in words[:end]]
        assert row[-1][:2] == (words[end], ink("label"))
    assert len(rows) == 3
    columns = {(text, x) for row in rows for text, _, x in row}
    assert len(columns) == 7  # each token keeps its column
    assert texts(pictures.sliding(words[:5], 4, 3, "x")) == texts(pictures.sliding(words[:5], 4, 1, "x"))


def test_a_training_step_tells_its_story_in_order():
    picture = pictures.training_step(PROMPT, BEFORE, " law", AFTER, "x")
    story = [[text for text, _ in texts(picture, step)] for step in range(n_steps(picture))]
    first = {word: next(i for i, line in enumerate(story) if word in line) for word in set(sum(story, []))}
    assert first["guesses before"] == first["20.0%"] == 2
    assert first["right answer"] == 3 < first["error: update"] == 4
    assert first["guesses after the update"] == first["40.0%"] == 6
    grey = [of_role(texts(picture, step), "untrained").count("model") for step in range(7)]
    magenta = [of_role(texts(picture, step), "trained").count("model") for step in range(7)]
    assert grey == [1] * 5 + [0] * 2 and magenta == [0] * 5 + [1] * 2
    assert of_role(texts(picture, 5), "input") == shown(PROMPT * 2)  # the features go in once more
    end = texts(picture)
    assert of_role(end, "label").count("·law") == 3 and of_role(end, "output") == ["·the", "·of"]


def test_the_bars_of_a_training_step_have_one_scale():
    root = parse(pictures.training_step(PROMPT, BEFORE, " law", AFTER, "x"))
    bars = [float(element.get("width")) for element, _ in walk(root) if element.get("rx") == "2"]
    assert [bar / bars[0] for bar in bars] == [pytest.approx(ratio, rel=0.02) for ratio in (1, 0.5, 2, 0.5)]
    assert max(bars) == pytest.approx(208 - token_width(" law") - 60, abs=0.1)  # the largest fills the line


def test_one_token_comes_at_a_time_and_stays():
    picture = pictures.one_at_a_time(PROMPT, ANSWER, "x")
    assert of_role(texts(picture, 0), "output") == []
    for i in range(3):  # in the row, and what is fed back is a copy
        line = of_role(texts(picture, 2 * i + 1.4), "output")
        assert [word for word in shown(ANSWER) if word in line] == shown(ANSWER[: i + 1])
    root = parse(picture)
    frames, _ = films(root)
    below = [e for e, path in walk(root) if e.text == "·may" and path[-1].get("opacity") == "1"]
    assert len(below) == 2  # in its place, and under the model
    assert of_role(texts(picture), "output") == shown([*ANSWER, " may"])


def test_parameters_share_a_scale_and_lose_their_sign():
    after = {"wte": 2 * NOISE["wte"], "w": -4 * NOISE["w"]}
    picture = pictures.parameters(NOISE, after, "x")
    found = cells(picture)
    assert len(found) == 2 * (6 * 12 + 3 * 4)
    assert {fill for *_, fill, _ in found} == {ink("untrained"), ink("trained")}
    grey = [strength for *_, fill, strength in found[-24:] if fill == ink("untrained")]
    magenta = [strength for *_, fill, strength in found[-24:] if fill == ink("trained")]
    assert grey == [pytest.approx(0.06 + 0.84 / 4, abs=0.0051)] * 12 and magenta == [0.9] * 12
    assert [text for text, _ in texts(picture)][2:] == ["wte: 4353 × 16", "w: 3 × 4"]
    frames = [element for element, _ in walk(parse(picture)) if element.get("stroke") == ink("weight")]
    assert len(frames) == 4


@pytest.mark.parametrize(
    "used, n_ctx, numbers",
    [
        (1, 1, ["1"]),
        (2, 2, ["1", "2"]),
        (2, 2048, ["1", "2", "⋮", "2,048"]),
        (8, 8, list("12345678")),
        (12, 12, [*"12345678", "⋮", "12"]),
        (12, 256, [*"12345678", "⋮", "256"]),
    ],
)
def test_tracks_show_the_used_ones_and_the_last(used, n_ctx, numbers):
    picture = pictures.tracks([f"w{i}" for i in range(used)], n_ctx, "x")
    found = texts(picture)
    assert [text for text, fill in found if fill == "currentColor"] == numbers
    tokens = [f"w{int(number) - 1}" for number in numbers if number.isdigit() and int(number) <= used]
    assert of_role(found, "input") == tokens
    assert of_role(found, "trained") == [f"a window of {n_ctx:,} tracks"]
    lines = [element for element, _ in walk(parse(picture)) if element.get("stroke-dasharray")]
    assert len(lines) == (n_ctx > used)


def test_a_word_becomes_a_vector_becomes_a_word():
    picture = pictures.word_vector_word(" law", VECTOR, -VECTOR, AFTER, "x")
    first = {}
    for step in range(n_steps(picture)):
        for text, _ in texts(picture, step):
            first.setdefault(text, step)
    assert [first[text] for text in ("1  word to vector", "2  compute", "3  vector to word")] == [1, 2, 4]
    assert first["the layers"] == 2 and first["40.0%"] == first["·of"] == 4
    numbers = [number for _, _, number, *_ in cells(picture)]
    assert numbers == [pytest.approx(float(f"{x:.2g}")) for x in [*VECTOR[:12].tolist(), *(-VECTOR[:12]).tolist()]]
    assert sum(text == "… 128 numbers" for text, _ in texts(picture)) == 2


@calm
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=25))
def test_films_of_any_tokens_are_well_formed(strings):
    strings = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", string) for string in strings]
    picture = pictures.one_at_a_time(strings, strings[:3], "x")
    assert [text for text, fill in texts(picture) if fill == ink("input")].count(show_token(strings[0])) >= 1


# --- plots ---


def test_plots_take_the_ground_of_the_page():
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        pictures.plot_style()
        look = matplotlib.rcParams
        assert look["figure.facecolor"] == look["axes.facecolor"] == look["savefig.facecolor"] == "none"
        assert look["text.color"] == look["xtick.color"] == look["ytick.color"] == "#888888"
        assert look["axes.labelcolor"] == look["axes.edgecolor"] == "#888888"
        assert (look["figure.dpi"], look["font.size"], look["legend.frameon"]) == (110, 10, False)
        assert max(look["figure.figsize"]) <= 6
    for page in (LIGHT, DARK):
        assert contrast(rgb("#888888"), page) >= 3
