"""What each command can be told: the options of `gpt3 train`, `generate`, `eval` and
the others."""

# Made from book/m_commands.ipynb by tools/export.py; edit the chapter.
import os
from dataclasses import dataclass
from typing import Literal

from gpt3lib.options import FIRST, option

SPIKE = Literal["stop", "skip", "rollback"]
AGAIN = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a model, or go on where an earlier call of the same command was cut off.

    --from MODEL --pairs FILE.jsonl fine-tunes one that is there, on your own questions
    and answers: `gpt3 train --from --help` tells how.
    """

    size: option(str | None, "SIZE", "gpt3-100k … gpt3-175b; goes first", FIRST) = None
    text: option(tuple[str, ...], "FILE …", "your own texts; the rest is chosen") = ()
    data: option(tuple[str, ...], "FOLDER …", "what `gpt3 tokenize` made; a mix") = ()
    weights: option(tuple[float, ...], "W …", "shares of the data; else by length") = ()
    out: option(str | None, "FOLDER", "where the run lives; else runs/NAME") = None
    config: option(str | None, "FILE.yaml", "any of these fields, as YAML") = None
    minutes: option(float | None, "M", "with --text: how long it may take; 3") = None
    n_tokens: option(int, "N", "how many to learn from; else the data once") = None
    peak: option(float | None, "RATE", "the highest learning rate; else by size") = None
    batch_tokens: option(int, "N", "tokens of a step, when it has grown") = None
    first_batch_tokens: option(int, "N", "… and at first; a sixteenth") = None
    ramp_tokens: option(int, "N", "until then the batch grows") = None
    warmup_tokens: option(int, "N", "until then the learning rate grows") = None
    decay_tokens: option(int, "N", "until then it falls, to a tenth") = None
    weight_decay: option(float | None, "D", "of the matrices; 0.1") = None
    clip: option(float | None, "LENGTH", "of a step's gradient at most; 1.0") = None
    n_ctx: option(int, "N", "tokens in a window") = None
    attention: option(tuple[str, ...], "KIND …", "layers in turn: dense banded") = ()
    bandwidth: option(int, "N", "how many tokens back a banded layer sees") = None
    vocab_size: option(int, "N", "with --text: how many tokens are learned") = None
    seed: option(int, "N", "of the first weights and of the order; 0") = None
    micro_batch: option(int, "N", "sequences in memory at a time; 8") = None
    bf16: option(bool, "", "matrix products in bfloat16, for a GPU") = False
    compile: option(bool, "", "compile the model first, for a GPU") = False
    device: option(str | None, "NAME", "cpu, cuda or mps; else what is best") = None
    n_threads: option(int, "N", "of the processor; else 1 or all, by a trial") = None
    dp: option(int, "N", "copies; else what ranks are left", name="parallel.dp") = None
    fsdp: option(int, "N", "pieces of all numbers", name="parallel.fsdp") = None
    cp: option(int, "N", "pieces of each sequence", name="parallel.cp") = None
    tp: option(int, "N", "parts of each matrix", name="parallel.tp") = None
    pp: option(int, "N", "stages of layers", name="parallel.pp") = None
    chunks: option(int, "V", "stages on a rank", name="parallel.chunks") = None
    recompute: option(
        AGAIN | None, "WAY", "none, selective, full", name="parallel.recompute"
    ) = None
    save_every: option(int, "STEPS", "a checkpoint after so many; 100") = None
    keep_last: option(int, "N", "so many checkpoints stay; 3") = None
    keep_at: option(tuple[int, ...], "N …", "… and one from each of these tokens") = ()
    sample_every: option(int, "STEPS", "a sample after so many; 0 is never") = None
    prompt: option(str | None, "TEXT", "samples go on from it") = None
    on_spike: option(SPIKE | None, "WAY", "the loss jumps: stop, skip, rollback") = None
    go_ahead: option(bool, "", "begin even what does not fit") = False


AXES_ASKED = ("dp", "fsdp", "cp", "tp", "pp")  # their product: so many ranks
LAYOUT_ASKED = (*AXES_ASKED, "chunks", "recompute")
# what may be another when a run goes on
FREE = set(
    "out config go_ahead save_every keep_last keep_at on_spike micro_batch bf16 "
    "compile device sample_every prompt".split()
).union(LAYOUT_ASKED)


def torchrun_ranks() -> int:
    """How many processes torchrun has started of this command; 0 without it."""
    told = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return int(told[2]) if all(map(str.isdecimal, told)) else 0  # it tells all three


def torchrun_rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if torchrun_ranks() else 0


LORA_HELP = (
    "0, the default, trains all of the model; R trains two thin matrices beside each "
    "of its matrices (LoRA): a third of the memory, and a file of a few MB"
)


@dataclass(frozen=True)
class TuneConfig:
    """Fine-tune a model on pairs {"context": "…", "completion": "…"}, one a line.

    It learns to write the completion behind the context, and to end there. A twentieth
    of the pairs is held out, to measure it. Killed, the same command goes on.
    """

    start: option(str | None, "MODEL", "a run, a folder, a name …", name="from") = None
    pairs: option(str | None, "FILE.jsonl", "what is learned, a pair a line") = None
    out: option(str | None, "FOLDER", "where the run lives; else runs/NAME") = None
    config: option(str | None, "FILE.yaml", "any of these fields, as YAML") = None
    rank: option(int, "R", LORA_HELP) = None
    epochs: option(int, "N", "how often each pair is read; else 3 to 20") = None
    peak: option(float | None, "RATE", "the highest learning rate; else by size") = None
    batch: option(int, "N", "pairs of a step; 16") = None
    replay: option(tuple[str, ...], "FILE …", "texts, not to be forgotten") = ()
    share: option(float | None, "S", "of each batch that is replayed; 0.25") = None
    seed: option(int, "N", "of the pairs' order; 0") = None
    bf16: option(bool, "", "matrix products in bfloat16, for a GPU") = False
    device: option(str | None, "NAME", "cpu, cuda or mps; else what is best") = None
    n_threads: option(int, "N", "of the processor; else 1 or all, by a trial") = None
    save_every: option(int, "STEPS", "a checkpoint after so many; 100") = None


@dataclass(frozen=True)
class GenerateConfig:
    """Let a model write on from a prompt. Without one it asks, again and again."""

    model: option(str, "MODEL", "a run, a folder, a name such as gpt3-1m", FIRST)
    prompt: option(str | None, "PROMPT", "a text to go on from", FIRST) = None
    n_tokens: option(int, "N", "new tokens at most; 200") = 200
    temperature: option(float, "T", "0 is always the likeliest; 1.0") = 1.0
    top_k: option(int, "K", "choose among so many") = None
    top_p: option(float, "P", "… or among those with this share; 0.85") = 0.85
    seed: option(int, "N", "the same one, the same text; else by chance") = None
    device: option(str | None, "NAME", "cpu, cuda or mps; else what is best") = None


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model: its loss on texts, how many questions it answers right."""

    model: option(str, "MODEL", "a run, a folder, a name such as gpt3-1m", FIRST)
    data: option(tuple[str, ...], "PATH …", "texts, or what `gpt3 tokenize` made") = ()
    n_tokens: option(int, "N", "of each, at most; 1M") = 1_000_000
    task: option(tuple[str, ...], "TASK …", "tasks such as 2D+, or .jsonl") = ()
    shots: option(tuple[int, ...], "K …", "examples before each question; 0") = ()
    n: option(int, "N", "questions; else 100 of a task, all of a file") = None
    seed: option(int, "N", "the same one, the same examples; 0") = None
    beams: option(int, "N", "write with so many beams, as the paper with 4") = None
    by: option(
        Literal["token", "answer", "sum"], "HOW", "choices: per token, answer or sum"
    ) = "token"
    out: option(str | None, "FOLDER", "for the answers; else evals/MODEL") = None
    device: option(str | None, "NAME", "cpu, cuda or mps; else what is best") = None


@dataclass(frozen=True)
class TokenizeConfig:
    """Write texts as shards of token ids, which `gpt3 train --data` reads."""

    files: option(tuple[str, ...], "FILE …", ".txt, .md, .jsonl, folders", FIRST)
    out: option(str, "FOLDER", "where the shards go; it must not hold any")
    tokenizer: option(str, "NAME", "gpt2, learn, or a merges.txt") = "gpt2"
    vocab_size: option(int, "N", "with learn: how many tokens; else by length") = None
    field: option(str, "NAME", "of a .jsonl: where a line's text stands") = "text"
    shard_tokens: option(int, "N", "tokens in a file; 64M") = 2**26
    n_threads: option(int, "N", "else as many as there are cores") = None


@dataclass(frozen=True)
class PlanConfig:
    """Plan a run on many GPUs: its memory, time and cost, and which layouts fit.

    What is given of the layout holds; what is left out is proposed.
    """

    size: option(str, "SIZE", "gpt3-100k … gpt3-175b", FIRST)
    gpus: option(int, "N", "how many; 1024") = 1024
    gpu: option(str, "NAME", "v100-32gb … h200-141gb; h100-80gb") = "h100-80gb"
    per_node: option(int, "N", "GPUs in a machine, linked by NVLink; 8") = 8
    network: option(float, "GB/s", "of a GPU to other machines, each way; 50") = 50.0
    efficiency: option(float, "SHARE", "of the peak, while it computes; 0.5") = 0.5
    price: option(float | None, "DOLLARS", "of a GPU for an hour; else a guess") = None
    n_tokens: option(int, "N", "to learn from; 300 billion") = None
    batch_tokens: option(int, "N", "tokens of a step; else Table 2.1's") = None
    n_ctx: option(int, "N", "tokens in a window; 2048") = None
    dp: option(int, "N", "copies", name="parallel.dp") = None
    fsdp: option(int, "N", "pieces of all numbers", name="parallel.fsdp") = None
    cp: option(int, "N", "pieces of each sequence", name="parallel.cp") = None
    tp: option(int, "N", "parts of each matrix", name="parallel.tp") = None
    pp: option(int, "N", "stages of layers", name="parallel.pp") = None
    recompute: option(
        AGAIN | None, "WAY", "none, selective, full", name="parallel.recompute"
    ) = None
    micro_batch: option(int, "N", "sequences in memory at a time") = None
    top: option(int, "N", "layouts shown; 5") = 5
    dry_run: option(bool, "", "trace the fastest with the real code, minutes") = False


KIND = Literal["gpt2", "gpt_neo", "gpt3lib"]
NUMBERS = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ConvertConfig:
    """Write a model, with its tokenizer, as other programs read it."""

    model: option(str, "MODEL", "a run, a folder, a name such as gpt3-1m", FIRST)
    out: option(str, "FOLDER", "where it goes", FIRST)
    to: option(KIND, "KIND", "gpt2 (dense layers), gpt_neo (banded too) or gpt3lib")
    dtype: option(NUMBERS, "TYPE", "of the numbers; float32") = "float32"
