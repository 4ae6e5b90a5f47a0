"""A model by its name: let it write, measure it, hand it to other people's programs."""

# Made from book/h_using_models.ipynb by tools/export.py; edit the chapter.
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch

from gpt3lib.decoding import write_on
from gpt3lib.files import WeightsError, pick_device, write_beside, write_folder
from gpt3lib.loading import MANIFEST, MERGES, LoadingError, Tokens, read_documents
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.runs import load
from gpt3lib.texts import DATA
from gpt3lib.tokenization import END_OF_TEXT, Tokenizer
from gpt3lib.training import device_of
from gpt3lib.weights import OtherConfig, OtherGPT, layout_for


def write_tokenizer(tokenizer: Tokenizer, n_ctx: int, folder: Path) -> None:
    """The three files from which transformers makes the same tokenizer."""
    about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_ctx}
    about |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    vocabulary = {name: i for i, name in enumerate(tokenizer.names())}
    tokenizer.save(folder / "merges.txt")
    for name, told in (("vocab", vocabulary), ("tokenizer_config", about)):
        text = json.dumps(told, ensure_ascii=False)
        write_beside(folder / f"{name}.json", text.encode())


def write_model(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """A model and its tokenizer in a folder. Raises WeightsError."""
    model.save_pretrained(folder)
    write_tokenizer(tokenizer, model.config.n_ctx, Path(folder))


def find_device(name: str | None = None) -> torch.device:
    """The device of this name, else the best there is. Raises WeightsError."""
    try:
        device = torch.device(name) if name else pick_device()
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WeightsError(f"no device {name!r} here; try cpu, cuda or mps") from error
    return device


def find_folder_of(name: str) -> Path | None:
    """Where the model of this name lies: what a run has made, a folder, one of ours."""
    path = Path(name).expanduser()
    places = (path / "model", path, DATA / "models" / name)
    return next((p for p in places if (p / "config.json").is_file()), None)


def find_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a model; else GPT-2's or the book's, by the number of ids.

    Raises WeightsError when there is none.
    """
    beside = [folder / name for name in ("merges.txt", MERGES)]
    for path in (*beside, DATA / f"tokenizer-{vocab_size}.bpe"):
        if path.is_file():
            return Tokenizer.load(path)
    if vocab_size == 50257:
        return Tokenizer.gpt2()
    words = f"{folder} has no merges.txt, and none of {vocab_size:,} ids is known"
    raise WeightsError(f"{words}; put the model's own there")


def check_name(name: str) -> None:
    """Raise WeightsError for a name without a model that cannot be one of the hub's."""
    path, models = Path(name).expanduser(), DATA / "models"
    if (path / "adapter_config.json").is_file():
        merged = find_folder_of(str(path.parent))
        right = f"the merged model is {path.parent}" if merged else "merge it first"
        raise WeightsError(f"{name} is an adapter; {right}")
    size = r"gpt3-[\d.]+[kmb]"
    if re.fullmatch(size, name) and not path.exists():
        ours = [p.name for p in models.iterdir() if re.fullmatch(size, p.name)]
        ours.sort(key=lambda own: (own[-1], len(own), own))  # k is before m
        raise WeightsError(f"no {name} comes trained; there are {', '.join(ours)}")
    parts = re.split(r"[/\\]", name)  # the hub's have two parts at most
    here = len(parts) > 2 or "\\" in name or parts[0] in ("runs", ".", "..", "~", "")
    fine = path.exists() or not here
    WeightsError.unless(fine, f"{name}: no run and no model there")


def find_model(name: str, device: str | None = None) -> tuple[GPT, Tokenizer]:
    """A model and its tokenizer: of a run, even one on its way, a folder, or the hub.

    Raises WeightsError, RunError.
    """
    home, folder, run = find_device(device), find_folder_of(name), Path(name)
    begun = [*run.glob("step-*")]
    if folder is None and not begun:
        check_name(name)
    if folder is None and begun:  # its checkpoints, if no more yet
        model, folder = load(run, home), run / "data" / "train"
    else:
        model = GPT.from_pretrained(folder or name).to(home)
    return model, find_tokenizer(folder or run, model.config.vocab_size)


def write_text(model: GPT, tokenizer: Tokenizer, prompt: str, n_tokens: int, **ways):
    """Print a prompt and how the model goes on, piece by piece, to its end of text.

    seed: None for another text each time; temperature, top_k, top_p: see generate.
    """
    seed, dice = ways.pop("seed", None), torch.Generator(device_of(model))
    dice.seed() if seed is None else dice.manual_seed(seed)
    ways |= {"generator": dice, "stop": tokenizer.end_of_text}
    pieces = write_on(model, tokenizer, prompt or "\n", n_tokens, **ways)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@torch.no_grad()
def loss_of_text(model: GPT, ids: torch.Tensor) -> float:
    """The nats that a row of ids costs, all but its first, in windows side by side."""
    n_ctx, total = model.config.n_ctx, 0.0
    for start in range(0, len(ids) - 1, n_ctx):
        targets = ids[start + 1 : start + n_ctx + 1]
        inputs = ids[start : start + len(targets)]
        pair = (part[None].to(device_of(model)) for part in (inputs, targets))
        total += model.loss(*pair).item() * len(targets)
    return total


def whole_texts(paths, field: str = "text", limit: int | None = None) -> list[str]:
    """The documents of files and folders; limit: characters of each.

    Lines end with \\n, whatever they ended with. Raises LoadingError for what is no
    text, and when there is none.
    """
    found = []
    for document in (d for path in paths for d in read_documents(path, field)):
        text = ""
        for part in [document] if isinstance(document, str) else document:
            text += part
            if limit and len(text) >= limit:
                break
        found.append(text.replace("\r\n", "\n")[:limit])
    if not "".join(found).strip():
        names = ", ".join(map(str, paths))
        raise LoadingError(f"{names}: there is no text in it; give a longer one")
    return found


def text_ids(path: str, tokenizer: Tokenizer, limit: int) -> tuple[torch.Tensor, float]:
    """The first limit + 1 ids of a text or of a folder of tokens; bytes for each.

    Raises LoadingError: another tokenizer, no text.
    """
    if (Path(path) / MANIFEST).is_file():
        tokens = Tokens(path)
        if tokens.tokenizer.merges != tokenizer.merges:
            words = f"{path} was written by another tokenizer than the model's"
            right = "its ids mean other texts. Give the text itself"
            raise LoadingError(f"{words}; {right}")
        return tokens[: limit + 1], tokens.bytes_per_token
    texts, end = whole_texts([path], limit=16 * limit), tokenizer.end_of_text
    encode = tokenizer.to_tiktoken("measure").encode_ordinary
    ids = [i for text in texts for i in (end, *encode(text))][: limit + 1]
    n_bytes = len(tokenizer.decode_bytes(i for i in ids if i != end))
    return torch.tensor(ids), n_bytes / max(1, len(ids) - 1)


def measure(model: GPT, tokenizer: Tokenizer, path: str, limit: int = 10**6) -> dict:
    """How well a model predicts a text, or a folder of tokens; LoadingError.

    loss: nats for each token; bits_per_byte: for each byte of text; n_tokens: of how
    many.
    """
    ids, bytes_per_token = text_ids(path, tokenizer, limit)
    n_tokens = len(ids) - 1
    if n_tokens < 1 or not bytes_per_token:
        raise LoadingError(f"{path} has no text to predict; give a longer one")
    loss = loss_of_text(model, ids) / n_tokens
    bits = loss / math.log(2) / bytes_per_token
    return {"loss": loss, "bits_per_byte": bits, "n_tokens": n_tokens}


def tell(model, tokenizer, path: str, limit: int) -> None:
    """Print how well a model predicts a text."""
    found = measure(model, tokenizer, path, limit)
    print(
        f"{path}: loss {found['loss']:.3f}, perplexity {math.exp(found['loss']):.1f}, "
        f"{found['bits_per_byte']:.3f} bits per byte, over {found['n_tokens']:,} tokens"
    )


def as_neo(model: GPT) -> OtherGPT:
    """The same function made of GPT-Neo's parts, whose q, k and v have no biases.

    Raises WeightsError when a layer's Wq cannot be turned round.
    """
    config = OtherConfig(**asdict(model.config), qkv_bias=False, scaled=False)
    state = {k: t.to(torch.double, copy=True) for k, t in model.state_dict().items()}
    for layer in (f"blocks.{i}" for i in range(config.n_layers)):
        wq, wv, wo = (state[f"{layer}.attention.w{x}.weight"] for x in "qvo")
        bq, _, bv = (state.pop(f"{layer}.attention.w{x}.bias") for x in "qkv")
        try:
            shift = torch.linalg.solve(wq, bq)
        except RuntimeError as error:
            raise WeightsError(f"{layer}: Wq has no inverse ({error})") from error
        state[f"{layer}.ln_1.bias"] += shift  # Wq (x + shift) = Wq x + bq
        state[f"{layer}.attention.wo.bias"] += wo @ (bv - wv @ shift)
        wq *= config.d_head**-0.5
    twin = OtherGPT(config)
    twin.load_state_dict(state)
    return twin.eval()


def check_kind(model: GPT, kind: str) -> None:
    """Raise WeightsError unless a model of this kind can be this one."""
    fits = layout_for(model.config)
    if kind == "gpt2" and fits != kind:
        words = f"a GPT-2 has dense layers only, and this model is a {fits}"
        raise WeightsError(f"{words}; a gpt_neo has banded ones too")
    if kind == "gpt_neo" and fits == "opt":
        raise WeightsError("an OPT cannot be a GPT-Neo; a gpt3lib can be anything")
    if kind not in ("gpt2", "gpt_neo", "gpt3lib"):
        raise WeightsError(f"no kind {kind!r}; there are gpt2, gpt_neo and gpt3lib")


def check_free(folder: str | Path) -> None:
    """Raise WeightsError for a folder that holds a model, or a run."""
    names = "config.json", "*.safetensors", "model/config.json", "config.yaml", "step-*"
    taken = next((p for name in names for p in Path(folder).glob(name)), None)
    words = f"{folder} holds {taken and taken.name} already; give another folder"
    WeightsError.unless(taken is None, words)


def convert(model: GPT, tokenizer: Tokenizer, folder: str | Path, kind: str) -> GPT:
    """Write a model as a gpt2, gpt_neo or gpt3lib, with its tokenizer; what is written.

    Raises WeightsError for a kind that cannot hold it, and a folder that is taken.
    """
    check_kind(model, kind)
    check_free(folder)
    dtype = next(model.parameters()).dtype
    if kind == "gpt_neo" and type(model.config) is GPTConfig:
        model = as_neo(model).to(dtype)
    if kind != "gpt3lib":
        write_model(model, tokenizer, folder)
        return model
    config = json.dumps(asdict(model.config))
    about = {"format": "pt", "layout": kind, "config": config}
    write_folder(Path(folder), model.state_dict(), about, config + "\n")
    write_tokenizer(tokenizer, model.config.n_ctx, Path(folder))
    return model
