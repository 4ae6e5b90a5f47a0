"""Small questions without end, made by rules, each with its answer and a key that
keeps training honest."""

# Made from book/e_tasks.ipynb by tools/export.py; edit the chapter.
import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from typing import NamedTuple

from gpt3lib.files import Refusal
from gpt3lib.texts import DATA


class TaskError(Refusal, ValueError):
    """A task, a number of examples or a key that cannot be; says what is right."""


class Dice:
    """Choices that depend on the seed alone: the same on every machine and Python.

    The seed is any numbers and words. Only `random.random()` is used, whose stream
    Python keeps the same from version to version.
    """

    def __init__(self, *seed: int | str):
        self.random = random.Random(" ".join(map(str, seed))).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self.random() * n)

    def pick(self, things):
        """One of a list, a tuple or a string."""
        return things[int(self.random() * len(things))]

    def some(self, things, n: int) -> list:
        """n different places of a list, in random order."""
        rest, rand = list(things), self.random
        for i in range(n):
            j = i + int(rand() * (len(rest) - i))
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:n]


class Example(NamedTuple):
    """One line of a prompt: a question, its answer, and the key it is split by."""

    prompt: str
    answer: str
    key: str = ""


def is_held_out(key: str) -> bool:
    """Whether a key is for questions only: one in eight is, by its hash."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def on_side(make: Callable, key: Callable, held_out: bool):
    """What `make()` gives, made anew until its key is on the side we want.

    An empty key is on both sides. Raises TaskError when a side seems to be empty.
    """
    for _ in range(1000):
        made = make()
        if not key(made) or is_held_out(key(made)) == held_out:
            return made
    side = "held out" if held_out else "for training"
    raise TaskError(f"of 1,000 keys none is {side}; give the task more different keys")


ARROW = ("", " =>")  # what stands before a question, and what behind it


@dataclass(frozen=True)
class Task:
    """A generator of examples.

    make(dice, rule, spell) gives one Example; `spell` joins letters or digits with
    spaces, or with nothing. make_rule(dice) gives what all lines of a prompt share;
    without it the rule never changes. few_rules: so few that none is held out.
    repeats: a question may be among its own examples.
    """

    name: str
    description: str
    make: Callable
    make_rule: Callable = lambda dice: None
    few_rules: bool = False
    repeats: bool = False
    layouts: tuple = (ARROW,)

    def rule_key(self, rule) -> str:
        """What a rule is split by; empty when there are not enough of them."""
        return "" if rule is None or self.few_rules else f"{self.name} {rule}"

    def rule(self, dice: Dice, held_out: bool = False):
        """A rule for one prompt, from the training keys or from those held out."""
        return on_side(lambda: self.make_rule(dice), self.rule_key, held_out)

    def example(self, dice, rule=None, held_out=False, spaced=True) -> Example:
        """One example, by this rule or by a new one."""
        rule = self.rule(dice, held_out) if rule is None else rule
        spell = " ".join if spaced else "".join
        make = lambda: self.make(dice, rule, spell)
        return on_side(make, lambda example: example.key, held_out)


LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


def cipher(dice: Dice) -> list[tuple[str, str]]:
    """Eight letters, each to be written as one of the same eight."""
    letters = dice.some(LETTERS, 8)
    return sorted(zip(letters, dice.some(letters, 8)))


def coded(n: int, dice: Dice, rule, spell) -> Example:
    """n letters, each to be replaced by its secret letter."""
    given, answer = zip(*(dice.pick(rule) for _ in range(n)))
    return Example(spell(given), spell(answer), "".join(given))


def render(
    task: Task, examples, question=None, described=True, separator="\n", layout=0
) -> str:
    """The text of a prompt: description, examples, and the question, left open.

    An answer stands behind a space, so a model continues the open line with
    " " + answer. Without a question the text ends with a newline.
    """
    before, between = task.layouts[layout]
    lines = [task.description] if described else []
    lines += [f"{before}{prompt}{between} {answer}" for prompt, answer, _ in examples]
    if question is None:
        return separator.join(lines) + "\n"
    return separator.join([*lines, before + question.prompt + between])


def problem(task: Task, dice: Dice, shots: int, spaced: bool = True) -> tuple:
    """A list of `shots` examples with training keys, and a question held out.

    A rule that is new in every prompt is one held out, too, for all of the lines.
    """
    TaskError.unless_whole("shots", shots, 0)
    rule = task.rule(dice, held_out=True)
    question = task.example(dice, rule, held_out=True, spaced=spaced)
    examples = []
    while len(examples) < shots:
        example = task.example(dice, rule, spaced=spaced)
        if task.repeats or example.prompt != question.prompt:
            examples.append(example)
    return examples, question


def document(task: Task, dice: Dice, n_examples: int, spaced=True, **looks) -> str:
    """A text to train on: one rule, `n_examples` examples, training keys only.

    looks: described, separator and layout, as in `render`.
    """
    TaskError.unless_whole("n_examples", n_examples)
    rule = task.rule(dice)
    examples = [task.example(dice, rule, spaced=spaced) for _ in range(n_examples)]
    return render(task, examples, **looks)


SIGNS = {"plus": "+", "minus": "-", "times": "*"}
DO = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def key_of(a: int, sign: str, b: int) -> str:
    """The key of a calculation; 48 + 76 and 76 + 48 have the same."""
    return f"{a}{sign}{b}" if sign == "-" or a < b else f"{b}{sign}{a}"


def arithmetic(n_digits: int, word: str, dice: Dice, rule, spell) -> Example:
    """Two numbers of up to `n_digits` digits: What is 48 plus 76?"""
    end, sign = 10**n_digits, SIGNS[word]
    a, b = dice.below(end), dice.below(end)
    asked = f"What is {spell(str(a))} {word} {spell(str(b))}?"
    return Example(asked, spell(str(DO[sign](a, b))), key_of(a, sign, b))


def composite(dice: Dice, rule, spell) -> Example:
    """Three digits and two signs: What is 6+(4*8)?"""
    a, b, c = dice.below(10), dice.below(10), dice.below(10)
    outer, inner = dice.pick("+-*"), dice.pick("+-*")
    text, answer = f"{a}{outer}({b}{inner}{c})", DO[outer](a, DO[inner](b, c))
    return Example(f"What is {spell(text)}?", spell(str(answer)), text)


WORD_LIST = (DATA / "words.txt").read_text(encoding="utf-8").split()
SHORT = [word for word in WORD_LIST if len(word) < 6][:400]
MARKS = " .,!?/;:-"
STARTS = [a + b for a in "bdfgklmnprstvwz" for b in "aeiou"]
MADE_UP = [a + b for a in STARTS for b in "la mi zo ru ne do ki rta".split()]


def cycled(dice: Dice, word: str) -> str:
    """The word with its letters cycled: inevitably -> lyinevitab."""
    turn = 1 + dice.below(len(word) - 1)
    return word[turn:] + word[:turn]


def anagram(dice: Dice, word: str, fixed: int) -> str:
    """The word with all but `fixed` letters at either end in random order."""
    inner = word[fixed : len(word) - fixed]
    return word[:fixed] + "".join(dice.some(inner, len(inner))) + word[-fixed:]


def inserted(dice: Dice, word: str) -> str:
    """The word with a random mark or space between its letters: s.u!c c/e s-s"""
    return word[0] + "".join(dice.pick(MARKS) + letter for letter in word[1:])


def scramble(change: Callable, fixed: int = 0, spells: bool = True) -> Callable:
    """The `make` of a task: change(dice, word) is to be undone."""
    fitting = [w for w in WORD_LIST if len(set(w[fixed : len(w) - fixed])) > 1]

    def make(dice, rule, spell):
        word = changed = ""
        while changed == word:  # noon, reversed, is no question
            word = dice.pick(fitting)
            changed = change(dice, word)
        return Example(spell(changed) if spells else changed, spell(word), word)

    return make


def items(things: list | str, least: int, most: int, answer: Callable) -> Callable:
    """The `make` of a task on `least` to `most` of these letters or words.

    answer(given, rule) is a list of them.
    """

    def make(dice, rule, spell):
        given = dice.some(things, least + dice.below(most - least + 1))
        join = spell if things is LETTERS else " ".join
        return Example(join(given), join(answer(given, rule)), " ".join(given))

    return make


def sequence(dice: Dice, rule, spell) -> Example:
    """The next of 11, 14, 17, 20."""
    start, step = dice.below(60), 1 + dice.below(12)
    *given, answer = (spell(str(start + i * step)) for i in range(5))
    return Example(", ".join(given), answer, f"{start}, {start + step}")


PEOPLE = "Ann Tom Eve Sam Kate John Mary Hugh Jane Paul Rose Mark".split()
THINGS = "cup key hat ring book rope lamp coin drum flag sword bell".split()


def who(dice: Dice, rule, spell) -> Example:
    """Three people have three things; who has this one?"""
    (a, b, c), (x, y, z) = dice.some(PEOPLE, 3), dice.some(THINGS, 3)
    answer, asked = dice.pick([(a, x), (b, y), (c, z)])
    line = f"{a} has the {x}, {b} the {y}, {c} the {z}. Who has the {asked}?"
    return Example(line, answer, line)


NAMED = {
    "animal": "dog cat horse cow sheep bird fish lion bear wolf goat mouse",
    "body": "hand foot head eye ear nose arm leg knee tooth finger tongue",
    "clothes": "coat shoe hat shirt glove cloak belt boot gown sleeve cap ring",
    "colour": "red blue green black white brown pink grey yellow purple gold scarlet",
    "family": "mother father sister brother son daughter uncle aunt cousin wife niece",
    "food": "bread milk egg corn apple meat honey salt wine cheese fig butter",
    "house": "door wall roof window bed table chair lamp floor gate stair chamber",
    "sky": "sun moon star cloud rain snow wind storm thunder mist hail lightning",
}
GROUPS = {kind: words.split() for kind, words in NAMED.items()}


def odd_one(dice: Dice, rule, spell) -> Example:
    """Three words of one kind and one of another."""
    kind, other = dice.some(GROUPS, 2)
    same, odd = dice.some(GROUPS[kind], 3), dice.pick(GROUPS[other])
    line = " ".join(dice.some([*same, odd], 4))
    return Example(line, odd, " ".join(sorted(same)) + " / " + odd)


EASY = [
    Task("copy", "Copy the words.", items(SHORT, 3, 4, lambda w, _: w)),
    Task("last", "Give the last word.", items(SHORT, 2, 5, lambda w, _: w[-1:])),
    Task("reverse", "Reverse the words.", items(SHORT, 3, 4, lambda w, _: w[::-1])),
    Task("sort", "Sort the letters.", items(LETTERS, 4, 4, lambda w, _: sorted(w))),
    Task("sequence", "Continue the sequence.", sequence),
    Task("who", "Answer the question.", who),
    Task("odd", "Find the odd word.", odd_one),
]


def pairing(left: list | str, right: list | str, n: int) -> Callable:
    """The `make_rule` of a task: n things of `left`, each with one of `right`."""
    return lambda dice: sorted(zip(dice.some(left, n), dice.some(right, n)))


def one_pair(dice: Dice, rule, spell) -> Example:
    """One of the prompt's own pairs."""
    return Example(*dice.pick(rule))


def category(dice: Dice, rule, spell) -> Example:
    """A word; the answer is its kind's letter."""
    kind, letter = dice.pick(rule)
    return Example(dice.pick(GROUPS[kind]), letter)


def language(dice: Dice) -> tuple:
    """Made-up words for four colours and four animals, and which comes first."""
    colours, animals = dice.some(GROUPS["colour"], 4), dice.some(GROUPS["animal"], 4)
    return sorted(colours) + sorted(animals), dice.some(MADE_UP, 8), dice.below(2)


def phrase(dice: Dice, rule, spell) -> Example:
    """Two made-up words in the prompt's own language, to be translated."""
    known, made, swapped = rule
    i, j = dice.below(4), 4 + dice.below(4)
    foreign = [made[j], made[i]] if swapped else [made[i], made[j]]
    return Example(" ".join(foreign), f"{known[i]} {known[j]}")


def affix(dice: Dice, rule, spell) -> Example:
    """A word with the prompt's own letters before or behind it."""
    (letters, behind), word = rule, dice.pick(SHORT)
    whole = word + letters if behind else letters + word
    return Example(spell(word), spell(whole), word)


def secret(dice: Dice, rule, spell) -> Example:
    """A number; the answer is the sum with the prompt's own number."""
    a = dice.below(100)
    return Example(spell(str(a)), spell(str(a + rule)), key_of(a, "+", rule))


affixes = lambda dice: ("".join(dice.some(LETTERS, 1 + dice.below(2))), dice.below(2))
reorder = items(LETTERS, 5, 5, lambda letters, order: [letters[i] for i in order])
place = items(SHORT, 4, 4, lambda words, i: [words[i]])
halves = pairing(LETTERS[:13], LETTERS[13:], 6)
recalled, meanings = pairing(LETTERS, DIGITS, 8), pairing(MADE_UP, SHORT, 8)
FRESH = [
    Task("recall", "Recall the digit.", one_pair, recalled, repeats=True),
    Task("meaning", "Translate the word.", one_pair, meanings, repeats=True),
    Task("phrase", "Translate the words.", phrase, language),
    Task("category", "Name the group.", category, pairing(list(GROUPS), LETTERS, 4)),
    Task("place", "Choose a word.", place, lambda dice: dice.below(4), few_rules=True),
    Task("order", "Change the order.", reorder, lambda dice: dice.some(range(5), 5)),
    Task("affix", "Add the letters.", affix, affixes),
    Task("code", "Write in code.", partial(coded, 3), halves),
    Task("cipher", "Write in cipher.", partial(coded, 4), cipher),
    Task("secret", "Add the secret number.", secret, lambda dice: 1 + dice.below(99)),
]


COLOURS = "red blue green black brown purple orange gray".split()
MARKUP = {  # the words of the description, and the code; {x} and {y} are texts
    "button that says {x}": "<button@>{x}</button>",
    "heading that says {x}": "<h1@>{x}</h1>",
    "link that says {x}": "<a@>{x}</a>",
    "text that says {x}": "<p@>{x}</p>",
    "field that asks for {x}": '<input@ placeholder="{x}">',
    "picture of {x}": '<img@ alt="{x}">',
    "list of {x} and {y}": "<ul@><li>{x}</li><li>{y}</li></ul>",
    "card with {x} above {y}": "<div@><h2>{x}</h2><p>{y}</p></div>",
    "form for {x} with {y}": '<form@><input name="{x}"><button>{y}</button></form>',
}


def component(parts: list[str], code: Callable, dice: Dice, rule, spell) -> Example:
    """One of these parts, described; code(part, size, colour, rule) is its code."""
    part, colour = dice.pick(parts), dice.pick(COLOURS)
    size, (x, y) = dice.pick(["", "small", "large"]), dice.some(SHORT, 2)
    asked = f"a {size} {colour} {part}".replace("  ", " ")
    answer = code(part, size, colour, rule).format(x=x, y=y)
    return Example(asked.format(x=x, y=y), answer, asked)


def html(part: str, size: str, colour: str, rule) -> str:
    """HTML that a browser can show, with places for the texts."""
    return MARKUP[part].replace("@", f' class="{f"{size} {colour}".strip()}"')


CALLED = [  # the names that a made-up library gives to colour, size and text
    "color tone tint paint hue shade".split(),
    "size scale width font big".split(),
    ["", "label", "text", "title", "value", "caption"],
]


def jsx(part: str, size: str, colour: str, rule) -> str:
    """A component in the prompt's own library, with a place for the text."""
    tag, (tint, scale, text) = part.split()[0].title(), rule
    head = f'<{tag} {tint}="{colour}"' + (f' {scale}="{size}"' if size else "")
    return f'{head} {text}="{{x}}" />' if text else f"{head}>{{x}}</{tag}>"


ASKED, EQUALS = {"layouts": (("Q: ", " A:"),)}, {"layouts": (("", " ="),)}
SUMS = ["+ plus Add", "- minus Subtract", "x times Multiply"]
ARITHMETIC = [
    Task(f"{n}D{sign}", f"{verb} the numbers.", partial(arithmetic, n, word), **ASKED)
    for sign, word, verb in map(str.split, SUMS)
    for n in (2, 3, 4, 5)
    if sign != "x" or n == 2
] + [Task("1DC", "Work it out.", composite, **ASKED)]
SCRAMBLES = [
    Task(name, "Unscramble the letters into a word.", make, **EQUALS)
    for name, make in {
        "CL": scramble(cycled),
        "A1": scramble(lambda dice, word: anagram(dice, word, 1), 1),
        "A2": scramble(lambda dice, word: anagram(dice, word, 2), 2),
        "RI": scramble(inserted, spells=False),
        "RW": scramble(lambda dice, word: word[::-1]),
    }.items()
]


CODE = {"layouts": (ARROW, ("[example] ", " [toCode]"))}  # the second is the article's
ONE_TEXT = [part for part in MARKUP if "{y}" not in part]
invented = partial(component, ONE_TEXT, jsx)
library = lambda dice: [dice.pick(names) for names in CALLED]
COMPONENTS = [
    Task("html", "Write the HTML.", partial(component, [*MARKUP], html), **CODE),
    Task("jsx", "Write the component.", invented, library, **CODE),
]
EVERY = EASY + FRESH + ARITHMETIC + SCRAMBLES + COMPONENTS
TASKS: dict[str, Task] = {task.name: task for task in EVERY}
TWICE = "2D+ 2D- phrase category order affix code secret html jsx".split()
SELDOM = dict.fromkeys("4D+ 4D- 5D+ 5D-".split(), 0.5)
WEIGHTS: dict[str, float] = (
    dict.fromkeys(TASKS, 1.0) | dict.fromkeys(TWICE, 2.0) | SELDOM | {"cipher": 4.0}
)


def find(name: str) -> Task:
    """The task of this name. Raises TaskError, which lists the names."""
    TaskError.unless(name in TASKS, f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def numbered(seed: int, number: int, spaced=True, weights=WEIGHTS) -> str:
    """Document `number` of the stream, a function of seed and number alone.

    `weights` says how often each task comes, by its name.
    """
    dice, sums = Dice(seed, number), list(accumulate(weights.values()))
    point = dice.random() * sums[-1]
    task = find(next(name for name, end in zip(weights, sums) if point < end))
    looks = {
        "described": dice.random() < 2 / 3,
        "separator": dice.pick(["\n", "\n", "\n\n"]),
        "layout": int(dice.random() ** 2 * len(task.layouts)),  # the first more often
    }
    n_examples = 1 + dice.below(40)
    if dice.below(2):  # half of them are as long as a window of about 1,000 tokens
        tried = document(task, dice, 4, spaced, **looks)
        pieces = len(re.findall(r"[^\W\d]+|\d|[^\w\s]", tried))
        n_examples = min(64, int(4000 / max(pieces, len(tried) / 4)))
    return document(task, dice, n_examples, spaced, **looks)


def documents(seed: int, first=0, spaced=True, weights=WEIGHTS) -> Iterator[str]:
    """The endless stream of documents to train on, from number `first` on.

    Raises TaskError for weights of unknown tasks, negative ones, or none above 0.
    """
    for name, weight in weights.items():
        fine = find(name) and 0 <= weight < float("inf")
        TaskError.unless(fine, f"{name} has weight {weight}; give a number, 0 or more")
    TaskError.unless(any(weights.values()), "no task has a weight above 0; give one")
    return (numbered(seed, number, spaced, weights) for number in count(first))
