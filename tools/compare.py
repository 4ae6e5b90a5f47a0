"""Do a stored output and a fresh one agree, though a sum was added up in another order?

Another processor changes the last digits of a float, so nbval's exact comparison would be red there. Here

* decimals (a point or an exponent: 0.25, .5, 1., 1.2e-05) agree to the last digit of the one that shows fewer, give or
  take one in that digit. 1. is 1.000 without its zeros: the other number sets the digit, and 1. is never 2.
  Trailing zeros, blanks beside a decimal and the sign of a zero do not count;
* whole numbers, digits in names (w1, gpt3-1.3b, 3.0.0, #2f9e44) and every other character must be the same; 1 is
  whole, 1.0 is not. A run of blanks is as good as another run, for columns are padded; a line break is not a blank;
* in attributes and style sheets of HTML and SVG letters may touch numbers (M12.5,3L7.1,4), and 12 is also 12.0 without
  its zero: it agrees with 12.1, not with 12.2 nor with 13.

conftest.py puts `forgiving` around nbval's own comparison.
"""

import copy
import os
import re
from collections import defaultdict
from decimal import Decimal
from itertools import zip_longest

MARKUP = {"text/html", "image/svg+xml"}
# what draws: style sheets, and attributes that hold no words
DRAWING = re.compile(
    r"""(<style.*?</style>|(?<![\w:-])(?!aria-|alt=|title=|class=|id=|src=|href=|xlink:)[\w:-]+="[^"]*")""", re.DOTALL
)
# a decimal that is no part of a name: no letter, digit, point or hyphen joins it to a word
IN_TEXT = re.compile(r"( ?(?<![\w.])(?<!\w[-+])[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE][-+]))(?:[eE][-+]\d+)?(?!\w|[.-]\w) ?)")
IN_DRAWING = re.compile(r"( ?[-+]?(?:\d+\.?\d*|\.\d+) ?)")
SHOWS_DIGIT = re.compile(r"\.\d|[eE]")


def numbers_agree(one: str, other: str) -> bool:
    """True when two numbers differ by at most one in the last digit of the one that shows fewer digits."""
    shown = [Decimal(number).as_tuple().exponent for number in (one, other) if SHOWS_DIGIT.search(number)]
    first, second = Decimal(one), Decimal(other)
    if abs(first - second) > (Decimal(1).scaleb(max(shown)) if shown else 0):
        return False
    powers = "e" in one.lower() and "e" in other.lower()  # 1e-05 is near 9e-06, not near 1e-09
    return first == second or not powers or abs(first.adjusted() - second.adjusted()) <= 1


def pieces(text: str, markup: bool) -> list[str]:
    """The text cut at its numbers: odd places hold them with blanks beside, even places what must not differ."""
    text = re.sub(r'src="data:image/[^"]*"', 'src=""', text)  # nbval compares no bitmaps either
    text = re.sub(r"[ \t]+", " ", text)
    found = [""]
    for place, part in enumerate(DRAWING.split(text) if markup else [text]):
        first, *rest = (IN_DRAWING if place % 2 else IN_TEXT).split(part)
        found[-1] += first
        found += rest
    return found


def difference(stored: str, fresh: str, markup: bool = False) -> str:
    """Where two outputs first differ, in words; empty when they agree."""
    before, now = pieces(stored, markup), pieces(fresh, markup)
    for place, (old, new) in enumerate(zip_longest(before, now, fillvalue="")):
        if old != new and not (place % 2 and old and new and numbers_agree(old, new)):
            old, new = ("".join(side[place : place + 20]) for side in (before, now))
            same = len(os.path.commonprefix([old, new]))
            line = 1 + ("".join(before[:place]) + old[:same]).count("\n")
            start = max(0, same - 20)
            return f"line {line}: stored {old[start : start + 60]!r}, fresh {new[start : start + 60]!r}"
    return ""


def slots(outputs: list):
    """Every text among a cell's outputs as (dictionary, key in it, name of its kind)."""
    for output in outputs:
        for key in ("text", "evalue"):
            if isinstance(output.get(key), str):
                yield output, key, output.get("name", key)
        for mime, value in output.get("data", {}).items():
            if isinstance(value, str) and mime not in ("image/png", "image/jpeg"):
                yield output["data"], mime, mime


def settle(fresh: list, stored: list) -> tuple[list, list[str]]:
    """A copy of the fresh outputs with each text that agrees put as it is stored, and the differences that remain.

    nbval pairs the first text of a kind with the first stored one of that kind, the second with the second; so here.
    """
    fresh, waiting, found = copy.deepcopy(fresh), defaultdict(list), []
    for holder, key, kind in slots(stored):
        waiting[kind].append(holder[key])
    for holder, key, kind in list(slots(fresh)):
        if waiting[kind]:
            old = waiting[kind].pop(0)
            what = difference(old, holder[key], kind in MARKUP)
            if what:
                found.append(f"{kind}, {what}")
            else:
                holder[key] = old
    return fresh, found


def forgiving(exact):
    """nbval's comparison of a cell's outputs, on outputs that `settle` prepared; a failure names the differences."""

    def compare_outputs(cell, test, ref, skip_compare=None) -> bool:
        settled, found = settle(test, ref)
        same = exact(cell, settled, ref, skip_compare)
        if not same:
            cell.comparison_traceback += [f"first difference: {what}" for what in found]
        return same

    return compare_outputs
