"""The book's pictures, drawn with its pen: a map of the model, the article's films."""

# Made from book/b_scenes.ipynb by tools/export.py; edit the chapter.
from contextlib import contextmanager

from gpt3lib import pictures
from gpt3lib.pictures import WIDTH, Picture, Sheet, px, token_row, token_width, wrap


def model_box(picture, y, words: str, role="trained", x=70.0, width=300.0) -> None:
    """A model as a box 46 px high."""
    picture.rect(x, y, width, 46, role, fill=0.12, line=2.5, round=10)
    picture.text(x + width / 2, y + 28, words, role, size=16, bold=True)


def feed(picture, strings, places, y, step, role="input", middle=220) -> None:
    """A copy of the tokens sinks, within a step, into a model whose box is at y.

    middle: of the box, in pixels from the left.
    """
    for string, (x, line, width) in zip(strings, places):
        left = max(4, middle - width / 2)
        with picture.during(step, step + 0.8, arrive=(x - left, line - y - 10)):
            picture.token(left, y + 10, string, role, width)


def speaking(prompt, output, alt: str) -> Picture:
    """A prompt goes into the trained model, and text comes out (first picture)."""
    heard, y = wrap(prompt, top=30)
    said, bottom = wrap(output, top=y + 116)
    picture = Picture(WIDTH, bottom, alt, seconds=0.8)
    picture.text(4, 18, "prompt", anchor="start")
    picture.text(4, y + 104, "output", anchor="start")
    token_row(picture, prompt, heard)
    feed(picture, prompt, heard, y + 14, step=1)
    n_steps = min(12, len(said))  # a long answer leaves several tokens at a time
    for i, (string, (x, line, width)) in enumerate(zip(output, said)):
        away = ((WIDTH - width) / 2 - x, y + 24 - line)
        with picture.during(2 + i * n_steps // len(said), arrive=away):
            picture.token(x, line, string, "output", width)
    model_box(picture, y + 14, "trained model")
    return picture


def sliding(strings, first: int, count: int, alt: str) -> Picture:
    """Training examples from one text (third picture), `count` of them.

    A window of `first` tokens grows by one per line; the next token is the label.
    """
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
    """Guesses (token, probability) as bars, the label's in violet.

    The probability `full` is as long as fits.
    """
    column = min(0.45 * width, max(token_width(token) for token, _ in guesses))
    for token, chance in guesses:
        role = "label" if token == label else "output"
        long = max(1.0, (width - column - 60) * float(chance) / full)
        picture.token(x, y, token, role, column)
        picture.rect(x + column + 6, y + 4, long, 18, role, fill=0.5, line=0, round=2)
        left = x + column + 11 + long
        picture.text(left, y + 18, f"{float(chance):.1%}", anchor="start")
        y += 32


def training_step(features, before, label: str, after, alt: str) -> Picture:
    """Predict, compare, update (fourth picture).

    before, after: the guesses, lists of (token, probability).
    """
    places, y = wrap(features, top=30)
    full = max(float(chance) for _, chance in [*before, *after]) or 1.0
    high = y + 116 + 32 * max(len(before), len(after))
    picture = Picture(WIDTH, high, alt, seconds=1.2)
    picture.text(4, 18, "features", anchor="start")
    token_row(picture, features, places)
    first = 1, 0, 5, 4, "untrained", "before", before
    second = 5, 5, None, 228, "trained", "after the update", after
    for fed, start, stop, x, role, words, guesses in (first, second):
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
    seconds = min(1.0, 12 / max(1, len(output)))
    picture = Picture(WIDTH, y + 108, alt, seconds)
    picture.text(4, 18, "the prompt, and what has been said so far", anchor="start")
    token_row(picture, prompt, places)
    feed(picture, prompt, places, y + 14, step=0)
    for i, (string, place) in enumerate(zip(output, places[len(prompt) :])):
        (x, line, width), born = place, 2 * i + 0.8
        left, moves = (WIDTH - width) / 2, born + 0.5
        stays = None if i + 1 == len(output) else moves
        with picture.during(born, stays, arrive=(0, -50)):
            picture.token(left, y + 74, string, "output", width)
        with picture.during(moves, arrive=(left - x, y + 74 - line)):
            picture.token(x, line, string, "output", width)
        feed(picture, [string], [place], y + 14, 2 * i + 2, "output")
    model_box(picture, y + 14, "trained model")
    return picture


def before_after(before: dict, after: dict, alt: str) -> Picture:
    """Corners of matrices before training and right after it (sixth picture).

    before, after: name -> 2-D tensor. Only how large a number is, is drawn.
    """
    picture = Picture(WIDTH, 30 + 130 * len(before), alt)
    picture.text(4, 18, "before training", "untrained", anchor="start")
    picture.text(226, 18, "after training", "trained", anchor="start")
    corner_of = lambda table: [[abs(float(x)) for x in row[:12]] for row in table[:6]]
    for name, y in zip(before, range(30, 30 + 130 * len(before), 130)):
        corners = corner_of(before[name]), corner_of(after[name])
        scale = max(number for corner in corners for row in corner for number in row)
        for x, role, corner in zip((4, 226), ("untrained", "trained"), corners):
            wide, high = 14 * len(corner[0]), 14 * len(corner)
            picture.cells(x + 5, y + 5, corner, role, 14, scale)
            picture.rect(x, y, wide + 10, high + 10, "weight", line=2)
        words = f"{name}: {' × '.join(map(str, after[name].shape))}"
        picture.text(4, y + high + 28, words, anchor="start")
    return picture


def tracks(strings, n_ctx: int, alt: str) -> Picture:
    """The context window (seventh picture): n_ctx tracks, one token on each.

    All move at once. The first eight and the last are drawn.
    """
    shown = [*range(len(strings))][:8]
    shown += [None, n_ctx - 1] if n_ctx > len(shown) else []
    column, right = min(130, max(map(token_width, strings))), WIDTH - 56
    left, high = column + 74, 34 * len(shown)
    picture = Picture(WIDTH, high + 34, alt, seconds=2.0)
    for y, track in zip(range(30, 30 + high, 34), shown):
        name = "⋮" if track is None else f"{track + 1:,}"
        picture.text(44, y + 18, name, anchor="end")
        if track in range(len(strings)):
            picture.token(52, y, strings[track], "input", column)
            picture.line(left - 20, y + 13, WIDTH - 6, y + 13, "stream", 2)
            with picture.during(0, 1, arrive=(left - 30 - right, 0)):
                picture.rect(right + 12, y + 5, 28, 16, "stream", fill=0.7)
        elif track:
            picture.line(52, y + 13, WIDTH - 6, y + 13, "untrained", 1.5, "4 4")
    middle, look = (left + right) / 2, {"fill": 0.1, "line": 2.5, "round": 10}
    picture.text(middle, 18, f"a window of {n_ctx:,} tracks", "trained")
    picture.rect(left, 26, right - left, high, "trained", **look)
    return picture


def word_vector_word(word: str, vector_in, vector_out, guesses, alt: str) -> Picture:
    """A word becomes a vector, the vector a prediction, that a word (eighth picture).

    vector_in, vector_out: (d_model,); guesses: a list of (token, probability).
    """
    picture = Picture(WIDTH, 276 + 32 * len(guesses), alt, seconds=1.2)
    width = min(token_width(word), 264)
    picture.token(154 - width / 2, 6, word, "input", width)
    with picture.during(2):
        model_box(picture, 128, "the layers", x=22, width=264)
    arrows = {36: (1, "1  word to vector"), 98: (2, "2  compute")}
    arrows |= {178: (3, "result"), 236: (4, "3  vector to word")}
    for y, (step, words) in arrows.items():
        with picture.during(step):
            picture.arrow(154, y, 154, y + 27)
            picture.text(170, y + 18, words, anchor="start")
    for step, y, vector in ((1, 68, vector_in), (3, 208, vector_out)):
        with picture.during(step, arrive=(0, -36)):
            picture.cells(22, y, [vector[:12]], "stream", 22)
            picture.text(296, y + 16, f"… {len(vector):,} numbers", anchor="start")
    full = max(float(chance) for _, chance in guesses) or 1.0
    with picture.during(4, arrive=(0, -36)):
        guess_list(picture, 22, 270, WIDTH - 30, guesses, full)
    return picture


def draw_tower(picture: Picture, config, x: float, ground: float, scale: float) -> None:
    """A stack as a block: a layer is 4.4 px high, as wide and deep as its vectors."""
    wide, top = scale * config.d_model, ground - 4.4 * config.n_layers
    back = f"{px(0.12 * wide)},{px(-0.12 * wide)}"  # the way to its hidden edges
    roof = f"M{px(x)},{px(top)}l{back}h{px(wide)}L{px(x + wide)},{px(top)}z"
    side = f"M{px(x + wide)},{px(ground)}V{px(top)}l{back}V{px(ground - 0.12 * wide)}z"
    for path, fill in ((roof, 0.2), (side, 0.6)):
        look = f'fill="{pictures.colour("weight")}" fill-opacity="{fill}"'
        picture.add(f'<path d="{path}" {look} {pictures.stroke("weight", 0.8)}/>')
    for i, kind in enumerate(config.kinds):
        fill = 0.45 if kind == "dense" else 0.1
        picture.rect(x, ground - 4.4 * (i + 1), wide, 4.4, "weight", fill, 0.4, 0)


def towers(configs: dict, alt: str) -> Picture:
    """Stacks side by side at one scale, a vector rising in each (ninth picture).

    configs: name -> GPTConfig. Dense layers are dark, banded ones pale.
    """
    tall = max(config.n_layers for config in configs.values())
    scale = 236 / max(config.d_model for config in configs.values())
    ground, x = 44 + 4.4 * tall, 12.0
    picture = Picture(WIDTH, ground + 62, alt, seconds=0.8)
    for name, config in configs.items():
        draw_tower(picture, config, x, ground, scale)
        picture.text(x, ground + 20, name, "weight", anchor="start", bold=True)
        lines = f"{config.n_layers} layers", f"{config.d_model:,} numbers wide"
        for line, words in enumerate(lines):
            picture.text(x, ground + 38 + 17 * line, words, anchor="start")
        middle, high = x + scale * config.d_model / 2 - 5, 0.0
        for i in range(8):  # an eighth of the tallest in each step
            low, high = high, min(config.n_layers, tall * (i + 1) / 8)
            if low < high:
                stop = i + 1 if high < config.n_layers else None
                with picture.during(i, stop, arrive=(0, 4.4 * (high - low))):
                    y = ground - 4.4 * high - 5
                    picture.rect(middle, y, 10, 10, "stream", fill=1, round=5)
        x += 1.12 * scale * config.d_model + 30
    return picture


def draw_track(picture: Picture, y, step: float, sure, left, right, wide) -> None:
    """A dot runs along a track within a step; each layer it has passed lights up."""
    with picture.during(step, step + 1, arrive=(left - right, 0)):
        picture.rect(right - 18, y + 8, 10, 10, "stream", fill=1, round=5)
    for i, share in enumerate(sure):
        with picture.during(step + 0.7 * (i + 1) / len(sure)):
            x = left + wide * (i + 0.5) - 12
            picture.cells(x, y + 1, [[share]], "stream", 24, scale=max(sure))


def xray(prompt, output, said, sure, kinds, alt: str) -> Picture:
    """All tokens run through all layers; the last outputs count (tenth picture).

    said: the likeliest next token of each track; sure: (tracks, n_layers), how likely
    it is after each layer, drawn against its row's largest; kinds: of the layers.
    """
    names = [*prompt, *output[:-1]]
    first, last = (min(120, max(map(token_width, side))) for side in (names, said))
    left, right = 18 + first, WIDTH - 4 - last
    wide, high = (right - left - 14) / len(kinds), 32 * len(names)
    picture = Picture(WIDTH, 56 + high, alt)
    heads = (4, "in", "input"), (right, "out", "output"), (left, "layers", "trained")
    for x, words, role in heads:
        picture.text(x, 18, words, role, anchor="start")
    for i, kind in enumerate(kinds):
        x, dash = left + wide * i, "" if kind == "dense" else "4 3"
        picture.text(x + wide / 2, 40, i + 1, "trained")
        picture.rect(x + 2, 47, wide - 4, high, "trained", 0.04, dash=dash)
    for row, (name, answer) in enumerate(zip(names, said)):
        y, fed = 50 + 32 * row, row - len(prompt) + 1  # how many outputs are fed back
        step, way = 2 * max(0, fed), (right - 4, -32) if fed > 0 else (0, 0)
        with picture.during(max(0, step - 1), arrive=way):
            role = "output" if fed > 0 else "input"
            picture.token(4, y, name, role, min(first, token_width(name)))
        draw_track(picture, y, step, sure[row], left, right - 14, wide)
        with picture.during(step + 1):
            role = "output" if fed >= 0 else "untrained"
            width = min(last, token_width(answer))
            picture.token(right, y, answer, role, width)
            if fed < 0:  # nobody asked
                picture.line(right + 3, y + 13, right + width - 3, y + 13, role)
    return picture


PARTS = {  # part of the map -> its chapter, the role of its colour, its words
    "tokens": ("02_tokenization", "input", "Tokenization"),
    "embeddings": ("03_embeddings", "weight", "Embeddings"),
    "attention": ("04_attention", "trained", "Attention"),
    "band": ("05_sparse_attention", "trained", "Sparse attention"),
    "decoder": ("06_decoder", "stream", "The decoder"),
    "sizes": ("07_sizes", "weight", "Sizes"),
    "generation": ("08_generation", "output", "Generation"),
    "cache": ("09_cache", "stream", "The cache"),
    "decoding": ("10_decoding", "output", "Decoding"),
    "data": ("11_data", "input", "Data"),
    "loading": ("12_loading", "input", "Loading"),
    "training": ("13_training", "label", "Training"),
    "recipe": ("14_recipe", "label", "The recipe"),
    "runs": ("15_long_runs", "label", "Long runs"),
    "scaling": ("16_scaling_laws", "label", "Scaling laws"),
    "parallel": ("17_parallelism", "weight", "Parallelism"),
    "pipeline": ("18_pipelines", "weight", "Pipelines"),
    "elastic": ("19_many_machines", "label", "Many machines"),
    "plan": ("20_planning", "output", "Planning 175B"),
    "dry_run": ("20b_dry_run", "output", "The dry run"),
    "prompting": ("21_prompting", "input", "Prompting"),
    "evaluation": ("22_evaluation", "output", "Evaluation"),
    "finetuning": ("23_finetuning", "weight", "Fine-tuning"),
    "limits": ("23b_limits", "output", "Limits"),
    "weights": ("24_real_weights", "weight", "Real weights"),
}


class Map(Sheet):
    """The whole model, one part of it lit; each part links to its chapter."""

    kind = 'role="group"'  # no single image: its links are read one by one

    def __init__(self, lit: str | None, alt: str):
        super().__init__(WIDTH, 350, alt)
        self.lit = lit

    @contextmanager
    def part(self, name: str):
        """What is drawn inside belongs to a part: its link and its colour."""
        chapter, role, title = PARTS[name]
        here = ' aria-current="page"' if name == self.lit else ""
        # JupyterLab replaces the plain href of a link in a drawing by an error
        self.add(f'<a xlink:href="{chapter}.ipynb" aria-label="{title}"{here}>')
        self.add(f"<title>{title}</title>")
        self.bright = name == self.lit
        self.thick = 2.5 if self.bright else 1.5
        self.role = role if self.lit in (name, None) else "untrained"
        self.outline = f'fill="none" {pictures.stroke(self.role, self.thick)}'
        yield
        self.add("</a>")

    def box(self, x, y, w, words, h=26, dash="", upwards=False):
        """A box of the part, with its word."""
        fill, line = (0.25, 2.5) if self.bright else (0.06, 1)
        self.rect(x, y, w, h, self.role, fill, line, dash=dash)
        down, right = (0, 5) if upwards else (5, 0)  # from the middle to the baseline
        self.word(x + w / 2 + right, y + h / 2 + down, words, upwards=upwards)

    def word(self, x, y, words, anchor="middle", upwards=False):
        """A word of the part, bold when it is lit."""
        look = {"anchor": anchor, "upwards": upwards, "bold": self.bright}
        self.text(x, y, words, self.role, size=14, **look)

    def way(self, *points, head=True):
        """Straight lines through the points, with a head at the end."""
        path = "M" + "L".join(f"{x},{y}" for x, y in points[: len(points) - head])
        self.add(f'<path d="{path}" {self.outline}/>')
        if head:
            self.arrow(*points[-2], *points[-1], self.role, self.thick)

    def plus(self, x, y):
        """A sum: a circle on the stream, with a horizontal stroke."""
        self.add(f'<circle cx="{x}" cy="{y}" r="8" {self.outline}/>')
        self.line(x - 8, y, x + 8, y, self.role, self.thick)


def draw_decoder(sheet: Map) -> None:
    """The frame of a layer, what its two halves begin and end with, the last norm."""
    sheet.rect(56, 78, 288, 126, sheet.role, line=2.5 if sheet.bright else 1, round=10)
    sheet.word(66, 98, "layer", "start")
    for y in (109, 163):
        sheet.way((130, y), (150, y))
        sheet.box(150, y - 13, 46, "norm")
        sheet.way((196, y), (206, y))
        sheet.way((244, y + 13), (244, y + 27), (138, y + 27))
        sheet.plus(130, y + 27)
    sheet.box(206, 150, 76, "MLP")
    sheet.box(107, 210, 46, "norm", h=20)


ALT = (
    "The whole model. Text becomes tokens; embeddings make vectors of them; a straight "
    "line, the residual stream, runs through L layers, to which attention and MLP add; "
    "logits choose the next token, which joins the text. Below: many machines."
)


def draw_model(sheet: Map) -> None:
    """Text becomes tokens, tokens vectors; the layers; the same table leads out."""
    with sheet.part("tokens"):
        sheet.box(70, 4, 120, "tokens")
        sheet.way((130, 30), (130, 42))
    with sheet.part("embeddings"):
        sheet.box(70, 42, 120, "embeddings")
        sheet.word(198, 60, "token + position", "start")
        sheet.box(70, 240, 120, "logits")
    with sheet.part("attention"):
        sheet.box(206, 96, 76, "attention")
    with sheet.part("band"):
        sheet.box(286, 96, 50, "band", dash="4 3")
    with sheet.part("decoder"):
        draw_decoder(sheet)
    with sheet.part("sizes"):
        sheet.box(66, 166, 44, "× L")


def draw_use(sheet: Map) -> None:
    """The next token and its way back to the tokens; what makes that fast."""
    with sheet.part("generation"):
        sheet.way((130, 266), (130, 278))
        sheet.box(70, 278, 120, "next token")
        sheet.way((70, 291), (22, 291), (22, 198), head=False)
        sheet.way((22, 112), (22, 17), (70, 17))
    with sheet.part("cache"):
        sheet.box(358, 96, 70, "cache")
        sheet.way((358, 109), (338, 109))
        sheet.word(393, 139, "keys, values")
    with sheet.part("decoding"):
        sheet.box(6, 112, 32, "many texts", h=86, upwards=True)


def draw_scale(sheet: Map) -> None:
    """How large; a model cut in two, in stages, over machines; the plan of it."""
    with sheet.part("scaling"):
        sheet.box(370, 211, 58, "scaling", h=22)
        sheet.way((399, 233), (399, 249))
    with sheet.part("parallel"):
        sheet.box(6, 320, 62, "parallel")
        sheet.line(37, 320, 37, 346, sheet.role, dash="6 14")  # cut in two
        sheet.way((68, 333), (99, 333))
    with sheet.part("pipeline"):
        sheet.box(99, 320, 62, "pipeline")
        sheet.way((161, 333), (192, 333))
    with sheet.part("elastic"):
        sheet.box(192, 320, 74, "machines")
        sheet.way((260, 320), (260, 312), (373, 312), (373, 306))
    with sheet.part("plan"):
        sheet.box(297, 320, 42, "plan", dash="4 3")
        sheet.way((297, 333), (266, 333))
    with sheet.part("dry_run"):
        sheet.box(370, 320, 58, "dry run", dash="4 3")
        sheet.way((370, 333), (339, 333))


def draw_learning(sheet: Map) -> None:
    """Text is cleaned and dealt out; the loss and its way back; prompts, and marks."""
    with sheet.part("data"):
        sheet.box(370, 4, 58, "data")
        sheet.way((370, 17), (356, 17))
    with sheet.part("loading"):
        sheet.box(288, 4, 66, "loading")
        sheet.way((288, 17), (268, 17))
    with sheet.part("training"):
        sheet.way((190, 253), (222, 253))
        sheet.box(222, 240, 60, "loss")
        sheet.way((252, 278), (252, 266))
        sheet.box(222, 278, 60, "label")
        sheet.way((282, 253), (434, 253), (434, 163), (428, 163))
        sheet.word(340, 247, "update")
    with sheet.part("recipe"):
        sheet.box(292, 278, 58, "recipe")
        sheet.way((321, 278), (321, 257))
    with sheet.part("runs"):
        sheet.box(356, 278, 76, "long runs")
        sheet.way((393, 278), (393, 257))
    draw_scale(sheet)
    with sheet.part("prompting"):
        sheet.box(312, 35, 76, "prompts", h=22)
        sheet.way((312, 46), (250, 46), (250, 28))
    with sheet.part("evaluation"):
        sheet.way((172, 240), (172, 221), (206, 221))
        sheet.box(206, 210, 92, "evaluation", h=22)
    with sheet.part("finetuning"):
        sheet.box(346, 186, 82, "fine-tuning", h=22)
        sheet.way((393, 186), (393, 176))
    with sheet.part("limits"):
        sheet.way((298, 221), (308, 221))
        sheet.box(308, 210, 54, "limits", h=22)
    with sheet.part("weights"):
        sheet.box(358, 150, 70, "weights")
        sheet.way((358, 163), (346, 163))


def whole_model(lit: str | None = None, alt: str | None = None) -> Map:
    """The map of the whole model that each chapter begins with, with its part lit.

    lit: a name in PARTS, or None for all. Raises PictureError for another name.
    """
    if lit is not None and lit not in PARTS:
        names = ", ".join(PARTS)
        raise pictures.PictureError(f"no part {lit!r} on the map; there are {names}")
    here = f" Lit: {PARTS[lit][2]}." if lit else ""
    sheet = Map(lit, alt or ALT + here)
    stream = "stream" if lit in (None, "decoder") else "untrained"
    sheet.line(130, 68, 130, 210, stream, 3)
    sheet.line(130, 230, 130, 240, stream, 3)
    sheet.text(236, 22, "text", anchor="start")
    sheet.arrow(230, 17, 194, 17)
    for draw in (draw_model, draw_use, draw_learning):
        draw(sheet)
    return sheet
