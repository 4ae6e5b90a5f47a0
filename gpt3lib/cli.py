"""Train, ask, measure and convert models from a terminal: the command `gpt3`."""

# Made from book/f_command_line.ipynb by tools/export.py; edit the chapter.
import json
import math
import os
import re
import shlex
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import fields, replace
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path

from gpt3lib.commands import (
    AXES_ASKED,
    FREE,
    LAYOUT_ASKED,
    ConvertConfig,
    EvalConfig,
    GenerateConfig,
    PlanConfig,
    TokenizeConfig,
    TrainConfig,
    TuneConfig,
    torchrun_rank,
    torchrun_ranks,
)
from gpt3lib.options import (
    CommandError,
    as_arguments,
    ask,
    called,
    read_yaml,
    write_yaml,
)


def read_config(kind: type, path: str | Path):
    """A config of this kind from a file of YAML. Raises CommandError."""
    arguments = as_arguments(kind, read_yaml(path), path)
    return ask(kind, arguments, name="train")


TUNES = {"from", "pairs"}


def kind_of(path: str | Path) -> type:
    """Whose options a file of YAML holds, of training or of fine-tuning."""
    return TuneConfig if TUNES & read_yaml(path).keys() else TrainConfig


def tunes(arguments: list[str], typed: dict[str, str]) -> bool:
    """Whether options of `gpt3 train` are of fine-tuning: by words or by a file."""
    if typed.keys() & {"--from", "--pairs"}:
        return True
    path = Path(typed.get("--config") or f"{typed.get('--out')}/config.yaml")
    others = typed.keys() & {"--text", "--data"} or arguments[0][:1] != "-"
    path = path.expanduser()
    return not others and path.is_file() and kind_of(path) is TuneConfig


def parse_train(arguments: list[str]) -> "TrainConfig | TuneConfig":
    """The options of `gpt3 train`; what is typed goes before what --config says."""
    words = [(*word.split("=", 1), after) for word, after in pairwise([*arguments, ""])]
    typed, kind = {name: value for name, value, *_ in words}, TrainConfig
    if arguments and tunes(arguments, typed):
        kind = TuneConfig
        check_tuning_words(arguments, typed)
        arguments = ["--help"] if typed.keys() & {"-h", "--help"} else arguments
    config = ask(kind, arguments, name="train")
    if config.config is None:
        return config
    return ask(kind, arguments, read_config(kind, config.config), name="train")


def check_tuning_words(arguments: list[str], typed: dict[str, str]) -> None:
    """Raise CommandError for words of `gpt3 train` that --from has no use for."""
    if typed.keys() & {"--text", "--data"}:
        right = "a text that it shall not forget is --replay"
        raise CommandError(f"--from learns from --pairs, not --text or --data; {right}")
    if not arguments[0].startswith("-"):
        right = f"write --from {arguments[0]} --pairs {typed.get('--pairs')}"
        words = f"{arguments[0]}: the model of --from has its size already"
        raise CommandError(words if "--from" in typed else right)


def asked(config) -> dict:
    """The fields that somebody has given: those that are not their defaults."""
    return {k: v for k, v in vars(config).items() if v != getattr(type(config), k)}


def check_train(config: TrainConfig) -> None:
    """Raise CommandError for options that contradict each other."""
    for word in (*config.text, *config.data):
        if re.fullmatch(r"gpt3-[\d.]+[kmb]", word) and not Path(word).exists():
            raise CommandError(f"{word} is a size: put it first, gpt3 train {word} …")
    if config.text and config.data:
        raise CommandError("--text or --data, not both: a text becomes data by itself")
    n, m = len(config.weights), len(config.data)
    if n not in (0, m):
        raise CommandError(f"{n} --weights for {m} --data; give one for each folder")
    for name in ("minutes", "vocab_size"):
        if getattr(config, name) is not None and not config.text:
            raise CommandError(f"--{name} chooses something for --text; give that too")
    for name in (*AXES_ASKED, "chunks"):
        if (n := getattr(config, name)) is not None and n < 1:
            raise CommandError(f"--parallel.{name} is {n}; it must be 1 or more")
    if (config.chunks or 1) > 1 and (config.pp or 1) == 1:
        words = f"--parallel.chunks {config.chunks} needs --parallel.pp 2 or more"
        raise CommandError(f"{words}: it cuts a pipeline's stages")
    if config.minutes is not None and not 0 < config.minutes < 1e6:
        raise CommandError(f"--minutes is {config.minutes}; it must be above 0")


def with_stored(config, path: Path):
    """The config that a run began with, and what may change. Raises CommandError."""
    if kind_of(path) is not type(config):
        kinds = {TrainConfig: "of --from and --pairs", TuneConfig: "of another kind"}
        words = f"the run in {path.parent} is one {kinds[type(config)]}"
        raise CommandError(f"{words}; give this one another --out")
    stored, given = read_config(type(config), path), asked(config)
    names = {field.name: called(field) for field in fields(config)}
    for name in sorted(given.keys() - FREE):
        if given[name] != getattr(stored, name):
            raise CommandError(
                f"{names[name]} is {given[name]!r}, but the run in {path.parent} began "
                f"with {getattr(stored, name)!r}; give it that again, or another --out"
            )
    new = {name: given[name] for name in given.keys() & FREE}
    if new.keys() & set(AXES_ASKED):  # another layout: nothing of the old one stays
        stored = replace(stored, **dict.fromkeys((*AXES_ASKED, "chunks")))
    return replace(stored, **new)


def run_tokenize(config: TokenizeConfig) -> None:
    """What `gpt3 tokenize` does."""
    from gpt3lib.loading import read_documents, text_size, write_tokens
    from gpt3lib.own_text import choose_tokenizer

    total = sum(text_size(path) for path in config.files)
    tokenizer = choose_tokenizer(config)
    documents = (d for path in config.files for d in read_documents(path, config.field))
    ways = {"shard_tokens": config.shard_tokens, "n_threads": config.n_threads}
    ways |= {"progress": sys.stderr.isatty(), "total_bytes": total}
    tokens = write_tokens(documents, config.out, tokenizer, **ways)
    n = tokens.n_documents
    print(
        f"{config.out}: {len(tokens):,} tokens, {n:,} document{'s' * (n != 1)}, "
        f"{tokens.bytes_per_token:.2f} bytes a token, {tokens.vocab_size:,} ids"
    )


def run_train(config: "TrainConfig | TuneConfig") -> None:
    """What `gpt3 train` does."""
    if isinstance(config, TuneConfig):
        run_tune(config)
        return
    check_train(config)
    check_ranks(config, retyped(config))
    name = Path(os.path.abspath(config.text[0])).stem if config.text else config.size
    config = replace(config, out=config.out or f"runs/{name}")
    if torchrun_ranks():
        train_together(config)
        return
    from gpt3lib import own_text

    config, parts, again = begin(config)
    finish(config, to_the_end(config, own_text.learn, parts, again))


def begin(config: TrainConfig) -> tuple:
    """A run's config, settled and stored in its folder, its parts; does it go on?"""
    from gpt3lib import own_text

    path = Path(config.out) / "config.yaml"
    with own_text.alone(path.parent):
        if again := path.exists():
            texts, config = config.text, with_stored(config, path)
            check_ranks(config, f"--out {shlex.quote(config.out)}", again)
            check_samples(config)
            if texts:  # are they what they were?
                own_text.prepare_text(texts, path.parent, config.vocab_size)
        else:
            check_samples(config)
            if torchrun_ranks() and config.size:  # before a text is read for an hour
                shape = own_text.plan_model(config)
                own_text.layout_of(config, shape, torchrun_ranks())
            config = own_text.settled(config)
        parts = own_text.ready(config)  # nothing is stored before it is checked
        if torchrun_ranks():
            own_text.layout_of(config, parts[1], torchrun_ranks())
        write_yaml(config, path)
    return config, parts, again


def run_tune(config: TuneConfig) -> None:
    """What `gpt3 train --from` does."""
    if torchrun_ranks() > 1:
        raise CommandError("--from trains in one process; leave torchrun away")
    name = Path(os.path.abspath(config.pairs)).stem if config.pairs else "none"
    path = Path(config.out or f"runs/{name}") / "config.yaml"
    from gpt3lib import own_pairs, own_text

    if again := path.exists():
        config = with_stored(config, path)
    own_pairs.check_tune(config)
    config = replace(config, out=str(path.parent))
    with own_text.alone(path.parent):
        config, parts = own_pairs.prepare_tuning(config)
        write_yaml(config, path)
    to_the_end(config, own_pairs.learn_pairs, parts, again)
    own_pairs.finish_tuning(config, parts)


def to_the_end(config, learn, parts, again: bool):
    """The model that a run has learned, or the exit code of a Ctrl-C."""
    if again:
        print(f"{config.out}: going on from its last checkpoint")
    print("Ctrl-C stops; the same command goes on.", flush=True)
    try:
        model, state = learn(config, parts)
        if not state.finished:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        words = f"{launcher(torchrun_ranks())} train --out {shlex.quote(config.out)}"
        print(f"go on with: {words}")
        raise SystemExit(130) from None
    return model


def finish(config: TrainConfig, model) -> None:
    """Write the trained model, measure it on what was held out, let it speak."""
    from gpt3lib import own_text, using

    tokens, *_ = own_text.open_data(config)[0].values()
    using.write_model(model, tokens.tokenizer, Path(config.out) / "model")
    for path in Path(config.out).glob("data/held_out"):
        using.tell(model, tokens.tokenizer, str(path), 100_000)
    prompt = config.prompt or ""
    using.write_text(model, tokens.tokenizer, prompt, 200, seed=0, top_p=0.85)
    print(f"\nMore of it: gpt3 generate {shlex.quote(config.out)}")


def model_called(name: str, device: str | None):
    """The model of a command, and its tokenizer. Raises CommandError, WeightsError."""
    from gpt3lib.using import find_model

    told, made = Path(name, "config.yaml"), Path(name, "model", "config.json")
    if told.is_file() and not made.is_file() and kind_of(told) is TuneConfig:
        right = f"gpt3 train --out {shlex.quote(name)} finishes it"
        raise CommandError(f"{name} has not learned all of its pairs yet; {right}")
    return find_model(name, device)


def prompts(config: GenerateConfig):
    """The prompt that was given; else what comes in, or what somebody types."""
    if config.prompt is not None:
        yield config.prompt
    elif not (sys.stdin and sys.stdin.isatty()):  # a pipe, a file, or closed
        yield sys.stdin.read().rstrip("\n") if sys.stdin else ""
    else:
        with suppress(ImportError):  # arrows move in the line; Windows' do anyway
            __import__("readline")
        print("A prompt and Enter; Ctrl-C stops a text, Ctrl-D ends.")
        with suppress(EOFError):
            while True:
                yield input("> ")


def run_generate(config: GenerateConfig) -> None:
    """What `gpt3 generate` does."""
    from gpt3lib.using import write_text

    model, tokenizer = model_called(config.model, config.device)
    names = ("temperature", "top_k", "top_p", "seed")
    ways = {name: getattr(config, name) for name in names}
    for prompt in prompts(config):
        try:
            write_text(model, tokenizer, prompt, config.n_tokens, **ways)
        except KeyboardInterrupt:
            if config.prompt is not None:
                raise
            print()


def run_eval(config: EvalConfig) -> None:
    """What `gpt3 eval` does."""
    from gpt3lib.using import tell

    held = sorted(map(str, Path(config.model).glob("data/held_out")))
    if not config.task and (config.shots or config.beams or config.out):
        raise CommandError("--shots, --beams and --out are for --task; give that too")
    if not (config.data or config.task or held):
        raise CommandError("on which text? Give --data: texts, or folders of tokens")
    if config.n_tokens < 1:
        raise CommandError(f"--n_tokens is {config.n_tokens}; it must be 1 or more")
    model, tokenizer = model_called(config.model, config.device)
    for path in config.data or held * (not config.task):
        tell(model, tokenizer, path, config.n_tokens)
    if config.task:
        ask_questions(config, model, tokenizer)


def ask_questions(config: EvalConfig, model, tokenizer) -> None:
    """What `gpt3 eval --task` does."""
    from gpt3lib.evaluation import examine_all

    out = config.out or f"evals/{Path(config.model).name}"
    ways = {"n": config.n, "seed": config.seed or 0, "out": out}
    ways |= {"beams": config.beams, "by": config.by}
    examine_all(model, tokenizer, config.task, config.shots or (0,), **ways)
    print(f"{out}: each answer; the same command goes on where it was stopped")


def run_convert(config: ConvertConfig) -> None:
    """What `gpt3 convert` does."""
    import torch

    from gpt3lib.using import convert

    model, tokenizer = model_called(config.model, "cpu")
    model = model.to(getattr(torch, config.dtype))
    written = convert(model, tokenizer, config.out, config.to)
    print(f"{config.out}: {written.num_params():,} parameters, a {config.to}")


def plan_it(config: PlanConfig) -> None:
    """What `gpt3 plan` does."""
    from gpt3lib.plan import run_plan

    planned = run_plan(config)
    if config.dry_run:
        from gpt3lib.dry_run import check_plan_of

        check_plan_of(*planned)


def launcher(n: int) -> str:
    """The words before a command that n ranks share; 0: one process, no torchrun."""
    return f"torchrun --nproc-per-node {n} -m gpt3lib.cli" if n else "gpt3"


def retyped(config) -> str:
    """The options of a config as one would type them."""
    given = asked(config)
    told = {called(f): given.get(f.name) for f in fields(config) if f.name != "config"}
    told = {name: value for name, value in told.items() if value is not None}
    for name, value in told.items():
        told[name] = [*map(str, value)] if isinstance(value, tuple) else str(value)
    return shlex.join(as_arguments(type(config), told, "the command"))


def check_ranks(config: TrainConfig, words: str, again: bool = False) -> None:
    """Raise CommandError for a layout without its processes. words: to type again."""
    n = math.prod(getattr(config, name) or 1 for name in AXES_ASKED)
    given = {name: getattr(config, name) for name in LAYOUT_ASKED}
    given = {k: v for k, v in given.items() if v not in (None, 1, "none")}
    if given and (n > 1 if torchrun_ranks() == 1 else not torchrun_ranks()):
        told = " ".join(f"--parallel.{name} {value}" for name, value in given.items())
        need = "a process" if n == 1 else f"{n} processes"
        right = f"{launcher(n)} train {words}"
        if again:  # the run began under that layout
            plain = {name: 1 for name in given} | {"recompute": "none"}
            left = " ".join(f"--parallel.{name} {plain[name]}" for name in given)
            right += f"; or, in this one, {left}"
        raise CommandError(f"{told} needs {need} of torchrun: {right}")


def check_samples(config: TrainConfig) -> None:
    """Raise CommandError for samples of a run on several ranks."""
    if torchrun_ranks() and config.sample_every:
        words = f"--sample_every {config.sample_every} is for one process; on several"
        right = "give --sample_every 0; `gpt3 generate` reads the newest checkpoint"
        raise CommandError(f"{words} {right}")


def train_together(config: TrainConfig) -> None:
    """What `gpt3 train` does on each rank of torchrun; the first one speaks."""
    from gpt3lib import own_text
    from gpt3lib.elastic import learn_together
    from gpt3lib.ranks import from_first

    again = from_first(lambda: str(begin(config)[-1]))
    config = read_config(TrainConfig, Path(config.out) / "config.yaml")
    parts = own_text.ready(config)
    layout = own_text.layout_of(config, parts[1], torchrun_ranks())
    sizes = {name: getattr(layout, name) for name in AXES_ASKED}
    told = " ".join(f"{name} {n}" for name, n in sizes.items() if n > 1) or "alone"
    print(f"{'ranks':12}{torchrun_ranks()}: {told}")
    learn = partial(learn_together, layout=layout)
    model = to_the_end(config, learn, parts, again == "True")
    if model is not None:  # on the first rank
        finish(config, model)


HELP = """gpt3: train, ask and measure GPT-3s of every size.

  gpt3 train --text mine.txt                  a model of your own text, in minutes
  gpt3 generate runs/mine "It was"            it goes on; without a prompt, it asks
  gpt3 eval runs/mine --data other.txt        loss, perplexity, bits per byte
  gpt3 eval gpt3-10m --task 2D+ --shots 0 8   sums; or a .jsonl of your questions
  gpt3 train --from gpt3-3m --pairs qa.jsonl  it learns your own answers to them

  gpt3 tokenize books/ --out tokens           texts become shards of token ids
  gpt3 train gpt3-1m --data tokens            one of our sizes, by the paper's recipe
  gpt3 plan gpt3-175b --gpus 1024             memory, days and cost of the largest
  gpt3 convert runs/mine theirs --to gpt_neo  for transformers and other programs

Kill a run whenever you like: the same command goes on where it was. Each command
has --help. Options of a run can stand in a YAML file, --config run.yaml; all that
were used are written next to the run. Perplexity 9 means: as unsure as among 9
tokens that are equally likely.
"""


COMMANDS = {  # name: its options, what does it
    "train": (parse_train, run_train),
    "generate": (partial(ask, GenerateConfig), run_generate),
    "eval": (partial(ask, EvalConfig), run_eval),
    "tokenize": (partial(ask, TokenizeConfig), run_tokenize),
    "plan": (partial(ask, PlanConfig), plan_it),
    "convert": (partial(ask, ConvertConfig), run_convert),
}


def act(arguments: list[str]) -> None:
    """Do what the arguments say. Raises CommandError, and all that a command does."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        raise CommandError(f"no command {name!r}; there are {names}: see `gpt3 --help`")
    if name != "train" and torchrun_ranks() > 1:
        raise CommandError(f"gpt3 {name} runs in one process; leave torchrun away")
    parse, do = COMMANDS[name]
    do(parse(options))


def main(arguments: list[str] | None = None) -> int:
    """The command `gpt3`. Returns its exit code: 0, 2 after an error, 130 for Ctrl-C.

    An error is one line; with GPT3LIB_TRACEBACK=1 the whole story.
    """
    rank = torchrun_rank()  # only the first one speaks
    for stream in (sys.stdout, sys.stderr):  # some consoles lack letters
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    try:
        with redirect_stdout(StringIO() if rank else sys.stdout):
            act(sys.argv[1:] if arguments is None else list(arguments))
        return 0
    except SystemExit as end:  # --help of a command
        return end.code or 0
    except KeyboardInterrupt:
        if not rank:
            print("\ngpt3: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads any more, as in `gpt3 generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("GPT3LIB_TRACEBACK"):
            raise
        if rank and isinstance(error, CommandError):  # the first one says it
            return 2
        words, kind = " ".join(str(error).split()), type(error)
        if not kind.__module__.startswith("gpt3lib."):
            words = f"{kind.__name__}: {words} (GPT3LIB_TRACEBACK=1 tells where)"
        who = f"gpt3: rank {rank}" if rank else "gpt3"
        print(f"{who}: {words}", file=sys.stderr)
        if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # for torchrun's table
            about = {"py_callstack": words, "timestamp": str(int(time.time()))}
            told = {"message": f"{who}: {words}", "extraInfo": about}
            Path(place).write_text(json.dumps({"message": told}))
        return 2


if __name__ == "__main__" and "__file__" in globals():  # in no notebook
    sys.exit(main() if __spec__ else "gpt3: start it as python -m gpt3lib.cli")
