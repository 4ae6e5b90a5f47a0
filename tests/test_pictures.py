"""The pen: what its SVG says against what was asked, and plots in the page's ink."""

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawings import (
    PROMPT,
    SPOKEN,
    STRINGS,
    at,
    away,
    cells,
    defines_its_colours,
    films,
    has_words,
    ink,
    one_decimal,
    parse,
    shrinks,
    stays_inside,
    texts,
    walk,
)
from gpt3lib import pictures
from gpt3lib.pictures import ROLES, Picture, PictureError, show_token, token_width

ROOT = Path(__file__).resolve().parent.parent


def short_film(strings, alt):
    """Each token comes in from another side."""
    picture = Picture(440, 60, alt)
    for step, string in enumerate(strings[:4]):
        with picture.during(step, arrive=(-10 * step, 5)):
            picture.token(4 + 90 * step, 20, string, width=86)
    return picture


def attention_map(weights, strings, alt):
    """As the chapter draws attention: nothing above the diagonal, names in green."""
    allowed = [row[: i + 1] for i, row in enumerate(weights)]
    return pictures.matrix(allowed, alt, "stream", strings, strings, cell=30, scale=1.0, names="input")


DRAWINGS = {
    "tokens": lambda strings, alt: pictures.tokens(strings, alt, ids=torch.arange(len(strings))),
    "matrix": lambda strings, alt: pictures.matrix(torch.ones(len(strings), 2), alt, rows=strings, columns=["x", "yy"]),
    "values": lambda strings, alt: pictures.matrix([[0.5, -1]], alt, columns=strings[:2], values=True),
    "attention_map": lambda strings, alt: attention_map(torch.ones(len(strings), len(strings)), strings, alt),
    "film": short_film,
}
calm = settings(deadline=None, max_examples=60)  # on a busy machine too
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


# --- every drawing ---


@every_drawing
@pytest.mark.parametrize("strings", STRINGS.values(), ids=STRINGS)
def test_a_drawing_is_well_formed_and_stays_inside_its_frame(name, strings):
    picture = DRAWINGS[name](strings, "words")
    stays_inside(picture, widest=560 if name in ("tokens", "film") else 1e9)
    one_decimal(picture)
    shrinks(picture)
    defines_its_colours(picture)


@every_drawing
def test_the_words_for_those_who_do_not_see_it(name):
    has_words(DRAWINGS[name](PROMPT, SPOKEN), SPOKEN)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_picture_without_words_is_refused(alt):
    with pytest.raises(PictureError, match="needs alt"):
        Picture(10, 10, alt)


@every_drawing
def test_the_same_drawing_is_the_same_text_and_another_has_other_names(name):
    one, again, other = DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "y")
    assert one.svg() == again.svg() == one.svg()
    assert not set(films(parse(one))[0]) & set(films(parse(other))[0])


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
    text = rgb("#222832" if page == LIGHT else "#ced6dd")
    for colour in colours.values():
        assert contrast(colour, page) >= 4.5
        assert contrast(colour, mixed(colour, page, 0.25)) >= 4.5  # the lit part of the map
        assert contrast(text, mixed(colour, page, 0.45)) >= 4.5  # a number in the strongest cell


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
    assert f'width="{pictures.px(width)}"' in rect
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


@calm
@given(st.floats(-10, 10), st.floats(0.01, 10))
def test_heat_says_sign_and_size(value, scale):
    fill, strength = re.fullmatch(r'fill="(.*)" fill-opacity="(.*)"', pictures.heat(value, scale, "stream")).groups()
    assert fill == ink("stream" if value >= -scale / 1000 else "untrained")
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
    found = cells(attention_map(weights, [f"t{i}" for i in range(T)], "x"))
    left, top = found[0][:2]
    places = {(round((y - top) / 30), round((x - left) / 30)): rest for x, y, *rest in found}
    assert places.keys() == {(i, j) for i in range(T) for j in range(i + 1)} and len(found) == T * (T + 1) // 2
    for (i, j), (number, _, strength) in places.items():
        assert number == pytest.approx(weights[i, j].item(), rel=0.06)
        assert strength == pytest.approx(0.06 + 0.84 * weights[i, j].item(), abs=0.0051)


def test_the_names_of_an_attention_map_stand_at_their_rows_and_columns():
    strings = ["one", " two", " three"]
    picture = attention_map(torch.ones(3, 3), strings, "x")
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
    with picture.during(1, 3, arrive=(-60, 25.04)):
        picture.text(5, 20, "moves")
    root = parse(picture)
    frames, _ = films(root)
    moving = [name for name, properties in frames.items() if "transform" in properties]
    assert len(moving) == 1
    (group,) = [element for element, _ in walk(root) if element.get("class") == moving[0]]
    place = [at(frames[moving[0]]["transform"], 100 * step / 5, away(group)) for step in (0, 1, 1.35, 1.7, 2.5, 5)]
    assert place[:2] == [-60 + 25j, -60 + 25j] and place[3:] == [0, 0, 0]
    assert abs(place[2] - (-30 + 12.5j)) < 0.1


def test_what_is_seen_at_the_same_time_shares_its_rules():
    picture = Picture(100, 30, "x")
    for i in range(5):
        with picture.during(1, 2, arrive=(i + 1, 0)):
            picture.text(5 * i, 20, "moves")
    frames, _ = films(parse(picture))
    assert len(frames) == 1


@pytest.mark.parametrize("noise", [0.0, 4e-8, -0.00004])
def test_numbers_leave_the_names_of_a_film_alone(noise):
    def film(number):
        picture = Picture(60, 60, "x")
        with picture.during(1, arrive=(30 * number, 0)):
            picture.cells(8, 8, [[number, 0.0 * number - noise]], scale=1.0)
        return picture.svg()

    assert film(0.501).replace("0.000000", "0.0") == film(0.501 + noise).replace("0.000000", "0.0") or noise == -0.00004
    names = [re.findall(r"\bp[0-9a-f]{8}\b", film(number)) for number in (0.501, 0.501 + noise, 0.9)]
    assert names[0] == names[1] == names[2] != []


def test_films_of_one_name_have_the_same_rules():
    def film(alt, stop):
        picture = Picture(60, 60, alt)
        with picture.during(1, stop, arrive=(3, 0)):
            picture.text(8, 20, stop)
        return parse(picture)

    rules = {}
    for root in (film("x", 2), film("x", 3), film("x", None), film("y", 2), film("x", 2)):
        assert rules.setdefault(root.get("class"), root.find("style").text) == root.find("style").text
    assert len(rules) == 4


def test_a_film_stops_under_the_pointer_and_in_focus():
    root = parse(drawn([(0, 1), (1, None)]))
    name = root.get("class")
    assert root.get("tabindex") == "0"
    assert f".{name}:is(:hover,:focus) g{{animation-play-state:paused}}" in root.find("style").text
    still = parse(pictures.tokens(["a"], "x"))
    assert still.get("tabindex") is still.get("class") is still.find("style") is None


# --- numbers in words ---


@pytest.mark.parametrize(
    "number, words",
    [(0.0312, "0.031"), (11.96, "12.0"), (12.04, "12.0"), (3.25, "3.2"), (0.0, "0.000000"), (-1e-9, "0.000000")],
)
def test_a_title_has_two_digits_and_a_point(number, words):
    assert pictures.digits(number) == words


@calm
@given(st.floats(-1e6, 1e6))
def test_a_title_always_has_a_point_and_is_near(number):
    words = pictures.digits(number)
    assert re.fullmatch(r"-?\d+\.\d+", words)
    assert abs(float(words) - number) <= max(0.0500001 * abs(number), 1e-6)


@calm
@given(st.floats(-1e4, 1e4))
def test_a_coordinate_has_at_most_one_decimal(number):
    assert re.fullmatch(r"-?\d+(\.[1-9])?", pictures.px(number)) and pictures.px(number) != "-0"
    assert abs(float(pictures.px(number)) - number) <= 0.05 + 1e-9


def test_noise_around_zero_has_one_colour():
    assert pictures.heat(1e-9, 1.0, "stream") == pictures.heat(-1e-9, 1.0, "stream")
    assert "untrained" in pictures.heat(-0.01, 1.0, "stream")


# --- plots ---

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


def curve(n=40, noise=0.0, alt="x", **look):
    """A plot with a line, points, an area, a log axis, a legend and words that must be escaped."""
    with matplotlib.rc_context():
        pictures.plot_style()
        _, axes = pyplot.subplots()
        x = torch.linspace(1, 9, n, dtype=torch.float64)
        axes.plot(x, x**2 * (1 + noise), "o-", color=ROLES["stream"], label="a < b & c", **look)
        axes.fill_between(x, x, x**2, alpha=0.25, color=ROLES["weight"])
        axes.axhline(4, color="#888888", ls=":")
        axes.axvline(4, color="black")
        axes.axvline(5, color="white")
        axes.set(title="A title", xlabel="steps", ylabel="loss: nats", yscale="log")
        axes.legend()
        return pictures.plot(alt=alt)


def test_a_plot_is_a_drawing_like_the_others():
    picture = curve(alt=SPOKEN)
    has_words(picture, SPOKEN)
    shrinks(picture)
    one_decimal(picture)
    defines_its_colours(picture)
    assert {"stream", "weight"} == set(re.findall(r"--draw-(\w+)", picture.svg()))
    assert picture.width <= 440
    assert not pyplot.get_fignums()


def test_the_text_of_a_plot_stays_text():
    root = parse(curve())
    words = [element.text for element, _ in walk(root) if element.tag == "text"]
    assert {"A title", "steps", "loss: nats", "a < b & c"} <= set(words)
    svg = curve().svg()
    assert min(map(float, re.findall(r"font-size:([\d.]+)", svg))) >= 12
    assert "font-family" not in svg and "DejaVu" not in svg


def test_the_ink_of_a_plot_is_that_of_the_page():
    svg = curve().svg()
    body = svg[svg.index(">") :]
    assert not re.search(r"#[0-9a-f]{6}|#[0-9a-f]{3}\b|black|white|gray|grey", body, flags=re.IGNORECASE)
    assert "currentColor" in body and "stroke:none" in body
    assert "<!--" not in svg and "<style" not in svg and "metadata" not in svg and "xlink" not in svg
    assert "opacity:0.25" in svg


def test_each_name_in_a_plot_is_used_and_each_use_has_a_name():
    root = parse(curve())
    names = [element.get("id") for element, _ in walk(root) if element.get("id")]
    uses = [value for element, _ in walk(root) for key in ("href", "clip-path") if (value := element.get(key))]
    assert len(names) == len(set(names)) >= 3
    assert set(names) == {use.removeprefix("url(").removesuffix(")").removeprefix("#") for use in uses}
    assert not set(names) & {element.get("id") for element, _ in walk(parse(curve(alt="y")))}


@pytest.mark.parametrize("noise", [1e-7, -3e-7])
def test_the_seventh_digit_does_not_change_a_plot(noise):
    from compare import difference

    assert difference(curve().svg(), curve(noise=noise).svg(), markup=True) == ""
    assert difference(curve().svg(), curve(noise=0.05).svg(), markup=True) != ""
    names = [re.findall(r' id="([^"]+)"', curve(noise=n).svg()) for n in (0.0, noise, 0.05)]
    assert names[0] == names[1] == names[2]


def test_a_line_keeps_each_of_its_points():
    with matplotlib.rc_context():
        pictures.plot_style()
        pyplot.plot(range(300))  # matplotlib would drop points by a rule that depends on the last digits
        assert max(path.get("d").count("L") for path in parse(pictures.plot("x")).iter("path")) == 299


def test_a_plot_that_is_too_large_becomes_a_bitmap():
    small, large = curve(), curve(n=3000)
    assert len(small.svg()) < 13_000
    html = large._repr_html_()
    assert html.startswith('<div class="picture"') and 'alt="x"' in html and "<svg" not in html
    data = re.search(r'src="data:image/png;base64,([^"]+)"', html).group(1)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert curve(n=3000).svg() == large.svg()


def test_a_plot_with_an_image_becomes_a_bitmap():
    pyplot.imshow([[0, 1], [1, 0]])
    assert pictures.plot("x").svg().startswith("<img")


def test_a_plot_without_words_is_refused_and_a_given_figure_is_drawn():
    figure, axes = pyplot.subplots()
    with pytest.raises(PictureError, match="needs alt"):
        pictures.plot(" ", figure)
    axes.set_title("given")
    pyplot.figure()
    assert ">given<" in pictures.plot("x", figure).svg()
    assert len(pyplot.get_fignums()) == 1
    pyplot.close("all")


def test_a_long_title_is_broken_into_lines():
    _, axes = pyplot.subplots()
    axes.set_title("many words " * 9)
    words = [element.text for element, _ in walk(parse(pictures.plot("x"))) if element.tag == "text"]
    lines = [text for text in words if "many" in text]
    assert len(lines) == 2 and max(map(len, lines)) <= 60


def test_plots_take_the_ground_and_the_colours_of_the_page():
    with matplotlib.rc_context():
        pictures.plot_style()
        look = matplotlib.rcParams
        assert look["figure.facecolor"] == look["axes.facecolor"] == look["savefig.facecolor"] == "none"
        grey = {look[key] for key in ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor")}
        assert grey == {pictures.INK}
        assert (look["font.size"], look["legend.frameon"], look["xtick.labelsize"]) == (13, False, 12)
        assert look["figure.figsize"][0] * 72 <= pictures.WIDTH
        assert {color.lower() for color in look["axes.prop_cycle"].by_key()["color"]} == set(ROLES.values())
    for page in (LIGHT, DARK):
        assert contrast(rgb(pictures.INK), page) >= 4
    # the site makes a bitmap lighter in the dark
    css = (ROOT / "book" / "_static" / "book.css").read_text()
    lighter = float(re.search(r"\.picture img \{\s*filter: brightness\(([\d.]+)\)", css)[1])
    assert contrast(rgb(pictures.INK), LIGHT) >= 4.5
    assert contrast([lighter * channel for channel in rgb(pictures.INK)], DARK) >= 4.5
