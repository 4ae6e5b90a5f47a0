"""Drawings read back: what an SVG says, with an evaluation of its CSS of our own, and what holds for all of them."""

import re
from xml.etree import ElementTree

import pytest

from gpt3lib.pictures import ROLES, token_width

NASTY = ["<b>", "&amp;", '"', "'", "\n", " a\tb", "法", "🙂", "]]>", "--", "\r"]
PROMPT = ["Rec", "ite", " the", " first", " law"]
LONG = [" to", " be", " or", " supercalifragilistic" * 4] * 12
STRINGS = {"prompt": PROMPT, "one": ["a"], "nasty": NASTY, "long": LONG}
SPOKEN = 'A "picture" of <tokens> & numbers, it\'s small'


def parse(picture):
    """The SVG as an XML tree; fails when it is not well formed. HTML knows xlink: without being told, XML does not."""
    return ElementTree.fromstring(picture.svg().replace("xlink:href", "href"))


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


def away(group):
    """A reader of values of the property transform, for a group that says how far away it comes from."""
    x, y = re.fullmatch(r"--x:(-?[\d.]+)px;--y:(-?[\d.]+)px", group.get("style")).groups()
    values = {"none": 0, "translate(var(--x),var(--y))": complex(float(x), float(y))}
    return values.__getitem__


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


def cells(picture):
    """(x, y, number in the title, fill, opacity) of every cell."""
    found = []
    for element, _ in walk(parse(picture)):
        title = element.find("title")
        if title is not None:
            x, y, strength = (float(element.get(key)) for key in ("x", "y", "fill-opacity"))
            found.append((x, y, float(title.text), element.get("fill"), strength))
    return found


def stays_inside(picture, widest=560, smallest=14):
    """Assert that nothing leaves the frame, and that each text can be read."""
    root = parse(picture)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert width <= widest
    assert float(root.get("width")) == pytest.approx(width)
    for element, _ in walk(root):
        if element.tag == "rect":
            x, y, w, h = (float(element.get(key)) for key in ("x", "y", "width", "height"))
            assert x >= -0.06 and x + w <= width + 0.11 and y >= -0.06 and y + h <= height + 0.11
        if element.tag == "text":
            size = float(element.get("font-size"))
            assert size >= smallest
            x, y, anchor = float(element.get("x")), float(element.get("y")), element.get("text-anchor")
            long = size * 0.61 * (token_width(element.text or "") - 12) / 9.1
            if "monospace" in element.get("style"):
                left = {"start": 0, "middle": long / 2, "end": long}[anchor]
                if element.get("transform"):
                    assert y + left - long >= -1 and y <= height
                else:
                    assert x - left >= -1 and x - left + long <= width + 1
            assert 10 <= y <= height - 2


def has_words(picture, alt, role="img"):
    """Assert that a screen reader is told what the picture shows."""
    root = parse(picture)
    assert root.get("role") == role and root.get("aria-label") == alt
    assert repr(picture) == f"Picture: {alt}"
    assert picture._repr_html_() == f'<div class="picture" style="overflow-x:auto">{picture.svg()}</div>'


def defines_its_colours(picture):
    """Assert that each role that is used has a colour, and no other."""
    root = parse(picture)
    used = set()
    for element, _ in walk(root):
        for key in ("fill", "stroke", "style"):
            used.update(re.findall(r"var\(--([a-z]{2,})\)", element.get(key, "")))
    rule = r"--(\w+):var\(--draw-(\w+),color-mix\(in srgb,(#\w{6}) \d+%,currentColor\)\);"
    rules = re.findall(rule, root.get("style"))
    assert used and {role for role, _, _ in rules} == used
    assert all(role == site and ROLES[role] == value for role, site, value in rules)


def shrinks(picture):
    """Assert that it shrinks to 80 % on a phone, and then scrolls."""
    least = float(re.search(r"min-width:(\d+)px", picture.svg()).group(1))
    assert least == pytest.approx(0.8 * picture.width, abs=0.6)
    assert "max-width:100%" in picture.svg() and "height:auto" in picture.svg()


def one_decimal(picture):
    """Assert that no coordinate has more than one decimal, and no opacity more than two."""
    for element, _ in [(parse(picture), ()), *walk(parse(picture))]:
        for key, value in element.attrib.items():
            most = 2 if "opacity" in key else 3 if key == "style" else 1
            if key not in ("aria-label", "id", "class", "href", "clip-path"):
                places = [len(digits) for digits in re.findall(r"\.(\d+)", value)]
                assert max(places, default=0) <= most, (element.tag, key, value)
