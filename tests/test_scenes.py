"""The book's pictures: films that tell their story in order, and the map of the model."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export
from drawings import (
    LONG,
    PROMPT,
    SPOKEN,
    STRINGS,
    cells,
    defines_its_colours,
    films,
    has_words,
    ink,
    of_role,
    one_decimal,
    opacity,
    parse,
    shrinks,
    stays_inside,
    texts,
    walk,
)
from gpt3lib import scenes
from gpt3lib.pictures import PictureError, show_token, token_width

ANSWER = ["A", " robot", " may"]
VECTOR = torch.linspace(-1, 1, 128)
NOISE = {"wte": torch.linspace(-0.1, 0.1, 4353 * 16).reshape(4353, 16), "w": torch.full((3, 4), 0.05)}
STACK = SimpleNamespace(n_layers=96, d_model=12288, kinds=("dense", "banded") * 48)
STUB = SimpleNamespace(n_layers=5, d_model=128, kinds=("dense", "banded", "dense", "banded", "dense"))
BEFORE, AFTER = [(" the", 0.2), (" law", 0.1)], [(" law", torch.tensor(0.4)), (" of", 0.1)]

DRAWINGS = {
    "speaking": lambda strings, alt: scenes.speaking(strings, strings[::-1], alt),
    "sliding": lambda strings, alt: scenes.sliding([*strings, *strings], len(strings), 3, alt),
    "training_step": lambda strings, alt: scenes.training_step(
        strings, [(string, 0.3) for string in dict.fromkeys(strings)], strings[0], AFTER, alt
    ),
    "one_at_a_time": lambda strings, alt: scenes.one_at_a_time(strings, strings[:4], alt),
    "before_after": lambda strings, alt: scenes.before_after(NOISE, {name: -2 * x for name, x in NOISE.items()}, alt),
    "tracks": lambda strings, alt: scenes.tracks(strings, 2048, alt),
    "towers": lambda strings, alt: scenes.towers({strings[0]: STACK, "other": STUB}, alt),
    "xray": lambda strings, alt: scenes.xray(
        strings, ANSWER, [*strings[:-1], *ANSWER], [[0.1, 0.0, 0.7]] * (len(strings) + 2), STACK.kinds[:3], alt
    ),
    "word_vector_word": lambda strings, alt: scenes.word_vector_word(strings[0], VECTOR, -VECTOR, AFTER, alt),
}
calm = settings(deadline=None, max_examples=60)  # on a busy machine too
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


# --- every drawing ---


@every_drawing
@pytest.mark.parametrize("strings", STRINGS.values(), ids=STRINGS)
def test_a_drawing_is_well_formed_and_stays_inside_its_frame(name, strings):
    picture = DRAWINGS[name](strings, "words")
    stays_inside(picture)
    one_decimal(picture)
    shrinks(picture)
    defines_its_colours(picture)


@every_drawing
def test_the_words_for_those_who_do_not_see_it(name):
    has_words(DRAWINGS[name](PROMPT, SPOKEN), SPOKEN)


@every_drawing
def test_the_same_drawing_is_the_same_text_and_another_has_other_names(name):
    one, again, other = DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "x"), DRAWINGS[name](PROMPT, "y")
    assert one.svg() == again.svg() == one.svg()
    assert not set(films(parse(one))[0]) & set(films(parse(other))[0])


def test_a_still_picture_needs_no_rules():
    assert [name for name in DRAWINGS if films(parse(DRAWINGS[name](PROMPT, "x")))[0]] == [
        "speaking",
        "training_step",
        "one_at_a_time",
        "tracks",
        "towers",
        "xray",
        "word_vector_word",
    ]


# --- the article's pictures ---


def n_steps(picture):
    _, seconds = films(parse(picture))
    return round(next(iter(seconds.values())) / picture.seconds) - 1


def shown(strings):
    return [show_token(string) for string in strings]


def test_speaking_shows_the_prompt_then_the_answer():
    picture = scenes.speaking(PROMPT, ANSWER, "x")
    assert of_role(texts(picture, 0), "output") == []
    assert of_role(texts(picture, 0), "input") == shown(PROMPT)
    for i in range(3):
        assert of_role(texts(picture, 2 + i), "output") == shown(ANSWER[: i + 1])
    assert of_role(texts(picture), "input") == shown(PROMPT) and of_role(texts(picture), "output") == shown(ANSWER)
    assert of_role(texts(picture), "trained") == ["trained model"]


def test_a_long_answer_is_spoken_in_few_steps():
    picture = scenes.speaking(PROMPT, LONG, "x")
    assert n_steps(picture) == 2 + 12
    assert len(of_role(texts(picture), "output")) == len(LONG)
    assert len(of_role(texts(picture, 2), "output")) == len(LONG) / 12


def test_sliding_has_one_label_more_to_the_right_in_each_row():
    words = [f"w{i}" for i in range(12)]
    picture = scenes.sliding(words, 4, 3, "x")
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
    assert texts(scenes.sliding(words[:5], 4, 3, "x")) == texts(scenes.sliding(words[:5], 4, 1, "x"))


def test_a_training_step_tells_its_story_in_order():
    picture = scenes.training_step(PROMPT, BEFORE, " law", AFTER, "x")
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
    root = parse(scenes.training_step(PROMPT, BEFORE, " law", AFTER, "x"))
    bars = [float(element.get("width")) for element, _ in walk(root) if element.get("rx") == "2"]
    assert [bar / bars[0] for bar in bars] == [pytest.approx(ratio, rel=0.02) for ratio in (1, 0.5, 2, 0.5)]
    assert max(bars) == pytest.approx(208 - token_width(" law") - 60, abs=0.1)  # the largest fills the line


def test_one_token_comes_at_a_time_and_stays():
    picture = scenes.one_at_a_time(PROMPT, ANSWER, "x")
    assert of_role(texts(picture, 0), "output") == []
    for i in range(3):  # in the row, and what is fed back is a copy
        line = of_role(texts(picture, 2 * i + 1.4), "output")
        assert [word for word in shown(ANSWER) if word in line] == shown(ANSWER[: i + 1])
    root = parse(picture)
    frames, _ = films(root)
    below = [e for e, path in walk(root) if e.text == "·may" and path[-1].get("opacity") == "1"]
    assert len(below) == 2  # in its place, and under the model
    assert of_role(texts(picture), "output") == shown([*ANSWER, " may"])


def test_before_and_after_share_a_scale_and_lose_their_sign():
    after = {"wte": 2 * NOISE["wte"], "w": -4 * NOISE["w"]}
    picture = scenes.before_after(NOISE, after, "x")
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
    picture = scenes.tracks([f"w{i}" for i in range(used)], n_ctx, "x")
    found = texts(picture)
    assert [text for text, fill in found if fill == "currentColor"] == numbers
    tokens = [f"w{int(number) - 1}" for number in numbers if number.isdigit() and int(number) <= used]
    assert of_role(found, "input") == tokens
    assert of_role(found, "trained") == [f"a window of {n_ctx:,} tracks"]
    lines = [element for element, _ in walk(parse(picture)) if element.get("stroke-dasharray")]
    assert len(lines) == (n_ctx > used)


def test_a_word_becomes_a_vector_becomes_a_word():
    picture = scenes.word_vector_word(" law", VECTOR, -VECTOR, AFTER, "x")
    first = {}
    for step in range(n_steps(picture)):
        for text, _ in texts(picture, step):
            first.setdefault(text, step)
    assert [first[text] for text in ("1  word to vector", "2  compute", "3  vector to word")] == [1, 2, 4]
    assert first["the layers"] == 2 and first["40.0%"] == first["·of"] == 4
    numbers = [number for _, _, number, *_ in cells(picture)]
    assert numbers == [pytest.approx(float(f"{x:.2g}")) for x in [*VECTOR[:12].tolist(), *(-VECTOR[:12]).tolist()]]
    assert sum(text == "… 128 numbers" for text, _ in texts(picture)) == 2


def dots(picture, step=None):
    """(x, y) of the orange dots that are seen in the middle of a step, where they end."""
    root = parse(picture)
    frames, seconds = films(root)
    length = next(iter(seconds.values())) / picture.seconds
    found = [(e, path) for e, path in walk(root) if e.get("rx") == "5" and e.get("fill") == ink("stream")]
    if step is None:
        found = [(e, path) for e, path in found if path[-1].get("opacity") == "1"]
    else:
        found = [(e, path) for e, path in found if opacity(frames, path, 100 * (step + 0.5) / length) > 0.5]
    return [(float(e.get("x")), float(e.get("y"))) for e, _ in found]


def test_towers_stand_at_one_scale_on_one_ground():
    picture = scenes.towers({"GPT-3": STACK, "ours": STUB}, "x")
    layers = {}
    for element, _ in walk(parse(picture)):
        if element.tag == "rect" and element.get("rx") == "0":
            x, y, w, h = (float(element.get(key)) for key in ("x", "y", "width", "height"))
            layers.setdefault(x, []).append((y, w, h, float(element.get("fill-opacity"))))
    large, small = layers.values()
    assert len(large) == 96 and len(small) == 5
    assert small[0][1] / large[0][1] == pytest.approx(128 / 12288, rel=0.02)
    assert {h for _, _, h, _ in large + small} == {4.4} and large[0][0] == small[0][0]
    assert [y for y, *_ in large] == sorted((y for y, *_ in large), reverse=True)
    dense = {fill for i, (*_, fill) in enumerate(large) if i % 2 == 0}
    banded = {fill for i, (*_, fill) in enumerate(large) if i % 2}
    assert len(dense) == len(banded) == 1 and min(dense) > max(banded)
    words = [text for text, _ in texts(picture)]
    assert words == ["GPT-3", "96 layers", "12,288 numbers wide", "ours", "5 layers", "128 numbers wide"]


def test_a_vector_rises_twelve_layers_in_a_step_and_leaves_a_small_stack_early():
    picture = scenes.towers({"GPT-3": STACK, "ours": STUB}, "x")
    assert n_steps(picture) == 8
    heights = []
    for step in range(8):
        (_, high), (_, low) = sorted(dots(picture, step))
        heights.append((high, low))
    assert len({low for _, low in heights}) == 1  # ours is out after the first step
    rises = [a - b for (a, _), (b, _) in zip(heights, heights[1:])]
    assert rises == [pytest.approx(12 * 4.4, abs=0.11)] * 7
    assert len(dots(picture)) == 2  # both are at the top when nothing moves


def tracks_of(picture, step=None):
    """Number of lit cells in each row, top row first, at a step; every row has its place."""
    root = parse(picture)
    frames, seconds = films(root)
    length = next(iter(seconds.values())) / picture.seconds
    rows = {}
    for element, path in walk(root):
        if element.find("title") is not None:
            lit = all(group.get("opacity", "1") == "1" for group in path)
            if step is not None:
                lit = opacity(frames, path, 100 * step / length) > 0.5
            rows.setdefault(float(element.get("y")), []).append(lit)
    return [sum(rows[y]) for y in sorted(rows)]


def test_an_xray_feeds_back_what_counts_and_strikes_out_the_rest():
    said = ["x1", "x2", *ANSWER]
    picture = scenes.xray(["a", "b", "c"], ANSWER, said, [[0.1, 0.2, 0.4]] * 5, STACK.kinds[:3], "x")
    assert tracks_of(picture) == [3] * 5
    assert tracks_of(picture, 1.5) == [3, 3, 3, 0, 0]  # the prompt runs at once
    assert tracks_of(picture, 3.5) == [3, 3, 3, 3, 0]
    assert tracks_of(picture, 5.5) == [3] * 5
    assert of_role(texts(picture, 0), "input") == ["in", "a", "b", "c"]
    assert of_role(texts(picture), "untrained") == ["x1", "x2"]
    strikes = [e for e, _ in walk(parse(picture)) if e.tag == "path" and e.get("stroke") == ink("untrained")]
    assert len(strikes) == 2
    assert of_role(texts(picture, 1), "output") == ["out", "A", "A"]  # one is out, its copy on the way back
    end = of_role(texts(picture), "output")
    assert end == ["out", "A", "A", "·robot", "·robot", "·may"]
    dashed = [e for e, _ in walk(parse(picture)) if e.get("stroke-dasharray") == "4 3"]
    assert len(dashed) == 1  # of three layers the second is banded


def test_an_xray_draws_each_row_against_its_own_largest():
    rows = [[0.1, 0.2], [0.004, 0.001], [0.5, 1.0]]
    picture = scenes.xray(["a", "b", "c"], ["d"], ["x", "y", "d"], rows, STACK.kinds[:2], "x")
    found = cells(picture)
    assert [number for _, _, number, *_ in found] == [number for row in rows for number in row]
    strongest = [max(strength for *_, strength in found[i : i + 2]) for i in (0, 2, 4)]
    assert strongest == [0.9] * 3


@calm
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=25))
def test_films_of_any_tokens_are_well_formed(strings):
    strings = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", string) for string in strings]
    picture = scenes.one_at_a_time(strings, strings[:3], "x")
    assert [text for text, fill in texts(picture) if fill == ink("input")].count(show_token(strings[0])) >= 1


# --- the map ---


def lit(sheet):
    """The parts of a map that have a colour of their own."""
    root = parse(sheet)
    colours = {}
    for link in root.iter("a"):
        used = {element.get(key) for element in link.iter() for key in ("fill", "stroke") if element.get(key)}
        colours[link.get("href")] = used - {"none"}
    return {href for href, used in colours.items() if used != {ink("untrained")}}


@pytest.mark.parametrize("part", scenes.PARTS)
def test_each_part_lights_alone(part):
    sheet = scenes.whole_model(part)
    chapter, role, title = scenes.PARTS[part]
    assert lit(sheet) == {f"{chapter}.ipynb"}
    (link,) = [link for link in parse(sheet).iter("a") if link.get("href") == f"{chapter}.ipynb"]
    assert link.get("aria-current") == "page"
    assert len([link for link in parse(sheet).iter("a") if link.get("aria-current")]) == 1
    assert {text.get("fill") for text in link.iter("text")} == {ink(role)}
    assert {text.get("font-weight") for text in link.iter("text")} == {"600"}
    assert title in parse(sheet).get("aria-label")


@pytest.mark.parametrize("part", [None, *scenes.PARTS])
def test_the_map_fits_its_frame(part):
    sheet = scenes.whole_model(part)
    stays_inside(sheet, widest=440, smallest=12)
    one_decimal(sheet)
    shrinks(sheet)
    defines_its_colours(sheet)
    has_words(sheet, sheet.alt, role="group")
    assert sheet.height <= 360
    ways = "".join(path.get("d") for path in parse(sheet).iter("path"))
    numbers = [float(number) for number in re.findall(r"[ML](-?[\d.]+)", ways)]
    assert min(numbers) >= 0 and max(numbers) <= 440
    for element, _ in walk(parse(sheet)):
        if element.tag == "text":  # a sans-serif letter is about half as wide as high
            x, long = float(element.get("x")), 0.55 * 14 * len(element.text)
            left = {"start": 0, "middle": long / 2, "end": long}[element.get("text-anchor")]
            assert element.get("transform") or (x - left >= 0 and x - left + long <= 440)


def test_each_chapter_with_a_number_is_on_the_map_in_the_order_of_the_book():
    links = [link.get("href") for link in parse(scenes.whole_model()).iter("a")]
    chapters = [chapter for chapter in export.CHAPTERS if chapter[0].isdigit()]
    assert links == [f"{chapter}.ipynb" for chapter in chapters] == sorted(links)
    for link in parse(scenes.whole_model()).iter("a"):
        assert link.get("aria-label") and link.find("title").text == link.get("aria-label")
        assert link.find(".//rect") is not None  # something to point at


def test_without_a_part_all_have_their_colours():
    sheet = scenes.whole_model()
    assert ink("untrained") not in sheet.svg() and len(lit(sheet)) == len(scenes.PARTS)
    assert "Lit:" not in sheet.alt and "aria-current" not in sheet.svg()
    assert scenes.whole_model("cache", alt="other words").alt == "other words"


def test_the_residual_stream_is_a_straight_line():
    paths = [path.get("d") for path in parse(scenes.whole_model()).iter("path") if path.get("stroke-width") == "3"]
    assert {x for path in paths for x in re.findall(r"[ML](\d+)", path)} == {"130"}


@pytest.mark.parametrize("part", ["attenton", "04_attention", ""])
def test_an_unknown_part_is_refused_and_the_valid_ones_are_named(part):
    with pytest.raises(PictureError, match="no part '.*' on the map; there are tokens, embeddings, attention, band"):
        scenes.whole_model(part)
