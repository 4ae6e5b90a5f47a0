"""The tasks: every answer against an oracle that reads the text alone; keys that never meet; the same everywhere."""

import hashlib
import re
import time
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from itertools import islice
from multiprocessing import get_context

import pytest

from gpt3lib import tasks
from gpt3lib.tasks import TASKS, Dice, Example, Task, TaskError, document, documents, numbered, problem, render
from gpt3lib.texts import DATA, corpus
from gpt3lib.tokenization import Tokenizer

EASY = "copy last reverse sort sequence who odd".split()
FRESH = "recall meaning phrase category place order affix code cipher secret jsx".split()
SUMS = "2D+ 2D- 3D+ 3D- 4D+ 4D- 5D+ 5D- 2Dx 1DC".split()
SCRAMBLES = "CL A1 A2 RI RW".split()


def held(key: str) -> bool:
    """The split, written once more: the first byte of the hash of the key, by eight."""
    return int(hashlib.blake2b(key.encode(), digest_size=1).hexdigest(), 16) % 8 == 0


def group(name: str, spaced: bool = True, n: int = 40) -> list[tuple[str, str]]:
    """n (prompt, answer) of one document, read back from its text."""
    task = TASKS[name]
    before, between = task.layouts[0]
    lines = document(task, Dice("group", name), n, spaced, described=False).splitlines()
    found = [re.fullmatch(re.escape(before) + "(.*)" + re.escape(between) + " (.*)", line) for line in lines]
    assert len(found) == n and all(found)
    return [match.groups() for match in found]


def together(text: str) -> str:
    return text.replace(" ", "")


# --- which tasks there are ---


def test_there_are_the_papers_fifteen_and_ours():
    assert set(TASKS) == {*EASY, *FRESH, *SUMS, *SCRAMBLES, "html"}
    assert all(name == task.name for name, task in TASKS.items())
    assert set(tasks.WEIGHTS) == set(TASKS) and min(tasks.WEIGHTS.values()) > 0
    assert {name for name, task in TASKS.items() if task.rule(Dice(0)) is not None} == set(FRESH)


@pytest.mark.parametrize("name", TASKS)
def test_a_description_is_one_line(name):
    assert re.fullmatch(r"[A-Z][\w ]+\.", TASKS[name].description, re.ASCII)


def test_words_are_the_most_frequent_of_the_corpus():
    counts = Counter(re.findall(r"(?<![\w'’-])[a-z]+(?![\w'’-])", "\n".join(corpus())))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    made = [word for word in ranked if 4 <= len(word) <= 8][:4000]
    assert (DATA / "words.txt").read_text(encoding="utf-8").split() == made == tasks.WORD_LIST


# --- every answer, from the text alone ---


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("name", EASY)
def test_easy_tasks(name, spaced):
    kind = {word: kind for kind, words in tasks.GROUPS.items() for word in words}
    for prompt, answer in group(name, spaced):
        given = prompt.split()
        if name == "copy":
            assert answer == prompt and len(given) in (3, 4)
        elif name == "last":
            assert answer == given[-1]
        elif name == "reverse":
            assert answer.split() == given[::-1]
        elif name == "sort":
            assert together(answer) == "".join(sorted(together(prompt))) and len(together(prompt)) == 4
        elif name == "sequence":
            numbers = [int(together(part)) for part in [*prompt.split(","), answer]]
            assert len({b - a for a, b in zip(numbers, numbers[1:])}) == 1 and len(numbers) == 5
        elif name == "who":
            assert re.search(rf"\b{answer} (has )?the {prompt.split()[-1][:-1]}[,.]", prompt)
            assert len(set(re.findall("[A-Z][a-z]+", prompt))) == 4  # three people, and Who
        else:
            assert Counter(map(kind.get, given)).most_common() == [(kind[given[i]], n) for i, n in common(given, kind)]
            assert kind[answer] not in [kind[word] for word in given if word != answer]


def common(given, kind):
    """Where the three of a kind begin, and where the odd one is."""
    kinds = [kind[word] for word in given]
    return [(next(i for i, k in enumerate(kinds) if kinds.count(k) == 3), 3)] + [
        (i, 1) for i, k in enumerate(kinds) if kinds.count(k) == 1
    ]


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("name", "recall meaning category code cipher".split())
def test_pairs_of_a_prompt_are_one_to_one(name, spaced):
    kind = {word: kind for kind, words in tasks.GROUPS.items() for word in words}
    pairs = group(name, spaced)
    if name == "category":
        pairs = [(kind[prompt], answer) for prompt, answer in pairs]
    if name in ("code", "cipher"):
        assert {len(together(prompt)) for prompt, _ in pairs} == {3 if name == "code" else 4}
        pairs = [pair for prompt, answer in pairs for pair in zip(together(prompt), together(answer), strict=True)]
    there, back = dict(pairs), {answer: prompt for prompt, answer in pairs}
    assert len(there) == len(back) == {"recall": 8, "meaning": 8, "category": 4, "code": 6, "cipher": 8}[name]
    assert all(there[left] == right and back[right] == left for left, right in pairs)
    if name == "code":
        assert not set(there) & set(back)
    if name == "cipher":
        assert set(there) == set(back)


def test_phrases_follow_one_dictionary_and_one_order():
    orders = set()
    for i in range(20):
        rule = TASKS["phrase"].rule(Dice(i))
        pairs = [TASKS["phrase"].example(Dice(i, j), rule) for j in range(60)]
        colours = {answer.split()[0] for _, answer, _ in pairs}
        animals = {answer.split()[1] for _, answer, _ in pairs}
        assert colours < set(tasks.GROUPS["colour"]) and animals < set(tasks.GROUPS["animal"])
        assert len(colours) == len(animals) == 4
        straight = {pair for p, a, _ in pairs for pair in zip(p.split(), a.split())}
        crossed = {pair for p, a, _ in pairs for pair in zip(p.split(), a.split()[::-1])}
        assert min(len(straight), len(crossed)) == 8 and max(len(straight), len(crossed)) > 20
        orders.add(len(straight) == 8)
    assert orders == {True, False}


@pytest.mark.parametrize("spaced", [True, False])
def test_one_place_one_order_one_affix_one_number(spaced):
    places = [{i for i, word in enumerate(p.split()) if word == a} for p, a in group("place", spaced)]
    assert len(places[0]) == 1 and set(map(tuple, places)) == {tuple(places[0])}
    orders = {tuple(together(p).index(letter) for letter in together(a)) for p, a in group("order", spaced)}
    assert len(orders) == 1 and sorted(*orders) == [0, 1, 2, 3, 4]
    affixes = {together(a).replace(together(p), "_") for p, a in group("affix", spaced)}
    assert len(affixes) == 1 and re.fullmatch("_[a-z]{1,2}|[a-z]{1,2}_", *affixes)
    numbers = {int(together(a)) - int(together(p)) for p, a in group("secret", spaced)}
    assert len(numbers) == 1 and 1 <= min(numbers) <= 99


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_arithmetic_is_what_python_says(name, spaced):
    written, signs = [], {"plus": "+", "minus": "-", "times": "*"}
    for prompt, answer in group(name, spaced, 200):
        asked = together(re.fullmatch(r"What is (.*)\?", prompt)[1])
        for word, sign in signs.items():
            asked = asked.replace(word, sign)
        assert eval(asked) == int(together(answer))
        written.append(asked)
        assert " ".join(together(answer)) == answer or not spaced
    if name == "1DC":
        assert all(re.fullmatch(r"\d[-+*]\(\d[-+*]\d\)", asked) for asked in written)
        assert len({asked[1] + asked[4] for asked in written}) == 9
    else:
        sign = name[2].replace("x", "*")
        numbers = [list(map(int, asked.split(sign))) for asked in written]
        largest = max(max(pair) for pair in numbers)
        assert 0.9 * 10 ** int(name[0]) < largest < 10 ** int(name[0])
        assert 0.4 < sum(map(sum, numbers)) / 400 / 10 ** int(name[0]) < 0.6  # uniform


def test_the_papers_layouts():
    """[B20] §3.9: Q: What is 48 plus 76? A: 124, and lyinevitab = inevitably."""
    line = r"Q: What is \d+ plus \d+\? A: \d+\n"
    assert re.fullmatch(line, document(TASKS["2D+"], Dice(0), 1, False, described=False))
    assert re.fullmatch(r"[a-z]+ = [a-z]+\n", document(TASKS["CL"], Dice(0), 1, False, described=False))
    spelled = r"Q: What is (\d )*\d plus (\d )*\d\? A: (\d )*\d\n"
    assert re.fullmatch(spelled, document(TASKS["2D+"], Dice(0), 1, described=False))


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("name", SCRAMBLES)
def test_scrambled_words(name, spaced):
    for prompt, answer in group(name, spaced, 200):
        word, changed = together(answer), prompt if name == "RI" else together(prompt)
        assert word in tasks.WORD_LIST and word != changed
        assert (answer == " ".join(word)) == spaced
        if name == "CL":
            assert changed in word + word and len(changed) == len(word)
        elif name in ("A1", "A2"):
            n = int(name[1])
            assert sorted(changed) == sorted(word) and changed[:n] == word[:n] and changed[-n:] == word[-n:]
        elif name == "RI":
            assert changed[::2] == word and not re.search(r"\w", changed[1::2]) and len(changed) == 2 * len(word) - 1
        else:
            assert changed == "".join(reversed(word))


class Reader(HTMLParser):
    """What a browser would see: the tags with their attributes, and the texts."""

    def __init__(self, code):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(code)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts += [value for name, value in attrs if name in ("placeholder", "alt", "name")]

    def handle_data(self, data):
        self.texts.append(data)


def test_html_says_what_was_asked():
    first = {"button": "button", "heading": "h1", "link": "a", "text": "p", "field": "input"}
    first |= {"picture": "img", "list": "ul", "card": "div", "form": "form"}
    seen = set()
    for prompt, answer in group("html", n=300):
        asked = re.fullmatch(r"a( small| large)? (\w+) (\w+) (?:that says|that asks for|of|with|for) (.*)", prompt)
        size, colour, part, texts = asked.groups()
        page = Reader(answer)
        assert page.tags[0] == (first[part], page.tags[0][1])
        assert page.tags[0][1]["class"].split() == [*(size or "").split(), colour]
        assert page.texts == re.split(" above | and | with ", texts)
        seen.add(part)
    assert seen == set(first)


def test_jsx_keeps_to_one_library():
    for i in range(30):
        rule = TASKS["jsx"].rule(Dice(i))
        lines = [TASKS["jsx"].example(Dice(i, j), rule) for j in range(30)]
        names = set()
        for prompt, answer, _ in lines:
            size, colour, part, text = re.fullmatch(r"a( small| large)? (\w+) (\w+) .*?(\w+)", prompt).groups()
            assert answer.startswith(f"<{part.title()} ")
            given = re.findall(r'(\w+)="(\w+)"', answer)
            assert [value for _, value in given] == [colour, *(size or "").split()] + [text] * answer.endswith("/>")
            assert answer.endswith("/>") or answer.endswith(f">{text}</{part.title()}>")
            names |= {(name, "colour" if value == colour else "size") for name, value in given if value != text}
        assert len(names) == 2 and len({kind for _, kind in names}) == 2


# --- keys ---


@pytest.fixture
def drawn(monkeypatch):
    """All keys that were accepted, as (key, wanted from those held out)."""
    keys, honest = [], tasks.on_side

    def spy(make, key, held_out):
        made = honest(make, key, held_out)
        keys.append((key(made), held_out))
        return made

    monkeypatch.setattr(tasks, "on_side", spy)
    return keys


def test_training_documents_use_no_key_held_out(drawn):
    for text in islice(documents(3), 1500):
        assert text
    keys = {key for key, _ in drawn if key}
    assert len(keys) > 20_000 and not any(map(held, keys))
    assert not any(held_out for _, held_out in drawn)


@pytest.mark.parametrize("name", TASKS)
def test_training_and_questions_never_meet(name, drawn):
    task = TASKS[name]
    for i in range(40):
        document(task, Dice("train", i), 20)
    training = {key for key, _ in drawn if key}
    shown, asked = set(), set()
    for i in range(60):
        drawn.clear()
        examples, question = problem(task, Dice("test", i), 8)
        shown |= {example.key for example in examples}
        asked |= {key for key, held_out in drawn if held_out and key}
        assert held(question.key) or not question.key
    assert asked and all(map(held, asked)) and not asked & (training | shown)
    assert not any(map(held, training))


def test_a_held_out_word_is_unscrambled_in_no_training_document():
    """Read from the text: what stands behind = in the scrambles, and before => in affix."""
    said = set()
    for text in islice(documents(11, weights=dict.fromkeys([*SCRAMBLES, "affix"], 1)), 1500):
        said |= {together(line.split(" = ")[1]) for line in text.splitlines() if " = " in line}
        said |= {together(line.split(" => ")[0]) for line in text.splitlines() if " => " in line}
    assert len(said) > 3300 and said < set(tasks.WORD_LIST)
    assert not any(map(held, said))


def test_a_held_out_sum_is_in_no_training_document_either_way_round():
    said = set()
    for text in islice(documents(5, weights={"2D+": 1, "2D-": 1, "2Dx": 1, "secret": 1}, spaced=False), 1500):
        said |= {tuple(found) for found in re.findall(r"(\d+) (plus|minus|times) (\d+)", text)}
    assert len(said) > 8000
    for a, word, b in said:
        a, b = (int(a), int(b)) if word == "minus" else sorted((int(a), int(b)))
        assert not held(f"{a}{tasks.SIGNS[word]}{b}")


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"category", "recall", "meaning", "phrase"}))
def test_no_question_stands_in_a_training_document(name):
    """Tasks whose single questions have keys; of the other four only the rule is new."""
    texts = "".join(numbered(2, i, weights={name: 1}) for i in range(60))
    lines = set(texts.splitlines())
    for i in range(40):
        _, question = problem(TASKS[name], Dice(i), 0)
        assert render(TASKS[name], [question], described=False).strip() not in lines


def grams(text: str) -> set[tuple]:
    """The 13-grams of a line as [B20] App. C takes them: lower case, words without punctuation."""
    words = [word for word in (re.sub(r"[^\w]", "", part) for part in text.lower().split()) if word]
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_13_grams_of_questions_are_in_the_training_stream_for_relatives_only():
    """`t c e p s e r = r e s p e c t` lies inside `s t c e p s e r = r e s p e c t s`; nothing else is shared."""
    trained = {gram for text in islice(documents(6), 3000) for line in text.splitlines() for gram in grams(line)}
    asked, shared = 0, set()
    for name in TASKS:
        for i in range(60):
            _, question = problem(TASKS[name], Dice("13", i), 0)
            found = grams(render(TASKS[name], [question], described=False))
            asked += len(found)
            shared |= {(name, question.key) for gram in found if gram in trained}
    assert len(trained) > 50_000 and asked > 2000
    assert len(shared) < 4 and {name for name, _ in shared} <= {"RW"}
    for _, word in shared:
        assert any(word[1:] in other and not held(other) for other in tasks.WORD_LIST)


def test_both_sides_of_every_small_space_of_rules():
    orders = {str(TASKS["order"].rule(Dice(i), held_out=True)) for i in range(200)}
    assert 10 <= len(orders) <= 20
    numbers = [n for n in range(1, 100) if held(f"secret {n}")]
    assert 8 <= len(numbers) <= 18
    for n in numbers:  # a question with a key held out exists for each of them
        assert TASKS["secret"].example(Dice(n), n, held_out=True).prompt
    assert {TASKS["place"].rule(Dice(i), held_out=True) for i in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_none_of_its_examples_but_where_that_is_the_task(name):
    inside = 0
    for i in range(30):
        examples, question = problem(TASKS[name], Dice(i), 32)
        assert len(examples) == 32
        inside += question.prompt in {example.prompt for example in examples}
    assert inside > 25 if name in ("recall", "meaning") else inside == 0


def test_one_key_in_eight_is_held_out():
    assert sum(map(held, tasks.WORD_LIST)) == sum(map(tasks.is_held_out, tasks.WORD_LIST))
    assert 450 < sum(map(tasks.is_held_out, tasks.WORD_LIST)) < 550
    assert [tasks.is_held_out(word) for word in tasks.WORD_LIST] == [held(word) for word in tasks.WORD_LIST]


# --- the same everywhere ---

FIRST_200 = "0c88170e9d99ba0807207a48f2a57fcf1b3bca3dc050c70ee84cf6e4f205304b"


def test_the_stream_is_the_same_on_every_machine():
    text = "\0".join(islice(documents(0), 200))
    assert hashlib.sha256(text.encode()).hexdigest() == FIRST_200


def test_a_document_depends_on_seed_and_number_alone():
    first = list(islice(documents(7), 30))
    assert list(islice(documents(7, first=20), 10)) == first[20:]
    assert numbered(7, 25) == first[25] != numbered(8, 25)
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(partial(numbered, 7), range(20, 30)) == first[20:]
    assert list(islice(documents(7, spaced=False), 30)) != first


def test_spaced_is_what_you_get_unless_you_say_otherwise():
    task = TASKS["RW"]
    assert (
        problem(task, Dice(0), 1) == problem(task, Dice(0), 1, spaced=True) != problem(task, Dice(0), 1, spaced=False)
    )
    assert document(task, Dice(0), 1) == document(task, Dice(0), 1, spaced=True)
    assert numbered(0, 1) == numbered(0, 1, spaced=True) == next(documents(0, first=1, spaced=True))


def test_spelling_changes_only_the_spaces():
    for i in range(200):
        name = list(TASKS)[i % len(TASKS)]
        loose, tight = (TASKS[name].example(Dice(i), spaced=spaced) for spaced in (True, False))
        assert loose.key == tight.key
        assert [together(part) for part in loose[:2]] == [together(part) for part in tight[:2]]


def test_dice_are_fair():
    dice = Dice("fair")
    counts = Counter(tuple(dice.some("abcd", 2)) for _ in range(12_000))
    assert len(counts) == 12 and all(abs(n - 1000) < 150 for n in counts.values())
    assert set(Counter(dice.below(6) for _ in range(600))) == set(range(6))
    assert {dice.pick("xyz") for _ in range(50)} == set("xyz")
    assert sorted(dice.some(range(9), 9)) == list(range(9))


# --- the shape of the stream ---


def test_shares_of_tasks_and_looks(monkeypatch):
    made, honest = [], tasks.document

    def spy(task, dice, n_examples, spaced=True, **looks):
        made.append((task.name, n_examples, looks))
        return "" if n_examples != 4 else honest(task, dice, 4, spaced, **looks)

    monkeypatch.setattr(tasks, "document", spy)
    last = []
    for i in range(6000):
        numbered(1, i)
        last.append(made[-1])
    names, whole = Counter(name for name, _, _ in last), sum(tasks.WEIGHTS.values())
    for name, weight in tasks.WEIGHTS.items():
        share = weight / whole
        assert abs(names[name] / 6000 - share) < 4 * (share / 6000) ** 0.5
    assert abs(sum(looks["described"] for _, _, looks in last) / 6000 - 2 / 3) < 0.03
    assert abs(sum(looks["separator"] == "\n\n" for _, _, looks in last) / 6000 - 1 / 3) < 0.03
    layouts = [looks["layout"] for name, _, looks in last if name in ("html", "jsx")]
    assert 0.2 < sum(layouts) / len(layouts) < 0.4
    lengths = [n for _, n, _ in last]
    assert min(lengths) == 1 and max(lengths) == 64
    assert 0.25 < sum(n > 32 for n in lengths) / 6000 < 0.75


@pytest.fixture(scope="module")
def tokenizer():
    """Learned from text and tasks, no digit beside another: as the family's is."""
    text = "".join(islice(documents(1), 1000)) + "\n".join(corpus())[:1_000_000]
    return Tokenizer.train(re.sub(r"(?<=\d)(?=\d)", "\n", text), 2049)


@pytest.mark.parametrize("name", TASKS)
def test_32_examples_fit(name, tokenizer):
    lengths = []
    for i in range(25):
        examples, question = problem(TASKS[name], Dice(i), 32)
        text = render(TASKS[name], examples, question, separator="\n\n") + " " + question.answer
        lengths.append(len(tokenizer.encode(text)))
    assert max(lengths) < 1024


def test_long_documents_fill_a_window_and_little_more(tokenizer):
    lengths = [len(tokenizer.encode(text)) for text in islice(documents(4), 300)]
    assert max(lengths) < 1400 and sum(n > 500 for n in lengths) > 75


def test_a_document_takes_less_than_five_milliseconds():
    start = time.process_time()
    for i in range(300):
        numbered(0, i)
    assert time.process_time() - start < 1.5


# --- layouts ---


def test_render():
    task = Task("x", "Do it.", lambda dice, rule, spell: Example("a", "b"), layouts=(("<", " >"), ("", ":")))
    two = [Example("a", "b"), Example("c", "d", "key")]
    assert render(task, two) == "Do it.\n<a > b\n<c > d\n"
    assert render(task, two, Example("e", "f"), separator="\n\n") == "Do it.\n\n<a > b\n\n<c > d\n\n<e >"
    assert render(task, [], Example("e", "f"), described=False, layout=1) == "e:"
    assert document(task, Dice(0), 2, layout=1, described=False) == "a: b\na: b\n"


def test_the_article_s_layout():
    text = document(TASKS["html"], Dice(0), 3, layout=1)
    assert len(re.findall(r"^\[example\] a .* \[toCode\] <.*>$", text, re.MULTILINE)) == 3


# --- bad input ---


@pytest.mark.parametrize("n", [-1, 1.0, "3", None, True])
def test_numbers_of_examples(n):
    with pytest.raises(TaskError, match="shots is .* whole number"):
        problem(TASKS["copy"], Dice(0), n)
    with pytest.raises(TaskError, match="n_examples is .* 1 or more"):
        document(TASKS["copy"], Dice(0), 0 if n is None else n)


def test_unknown_names_and_weights():
    with pytest.raises(TaskError, match="no task 'add'; there are copy, last"):
        tasks.find("add")
    assert tasks.find("copy") is TASKS["copy"]
    refused = {"no task 'x'": {"x": 1}, "weight -1": {"copy": -1}, "nan": {"copy": float("nan")}}
    refused |= {"inf": {"copy": float("inf")}, "above 0": {}, "no task has": {"copy": 0}}
    for words, weights in refused.items():
        with pytest.raises(TaskError, match=words):
            documents(0, weights=weights)
    assert numbered(0, 0, weights={"copy": 0, "last": 2})


def test_a_task_with_too_few_keys_says_so():
    one = Task("one", "Say it.", lambda dice, rule, spell: Example("a", "b", "always"))
    side = "for training" if held("always") else "held out"
    with pytest.raises(TaskError, match=f"none is {side}"):
        one.example(Dice(0), held_out=side == "held out")
    few = Task("few", "Say it.", lambda dice, rule, spell: Example("a", "b"), lambda dice: 0)
    with pytest.raises(TaskError, match="different keys"):
        few.rule(Dice(0), held_out=not held("few 0"))
