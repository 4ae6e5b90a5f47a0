"""Many prompts in one batch, text shown while it is made, and a search with beams."""

# Made from book/10_decoding.ipynb by tools/export.py; edit the chapter.
import codecs
from collections.abc import Iterable, Iterator

import torch

from gpt3lib.cache import KVCache, Reader, check_request, stream
from gpt3lib.files import as_float, is_whole
from gpt3lib.generation import PromptError, check_logits, check_model, last_logits
from gpt3lib.sparse_attention import banded_mask


# What is refused; the workshop at the end of this page has a table of it.
def as_list(items) -> list:
    """A sequence, tensor or array as a list; [None] for text and for a single thing."""
    items = items.tolist() if hasattr(items, "tolist") else items
    several = isinstance(items, Iterable) and not isinstance(items, (str, bytes, dict))
    return list(items) if several else [None]


def is_id(value) -> bool:
    """Whether a value is a whole number that fits into a tensor; -1 too."""
    return is_whole(value, least=float("-inf")) and int(value).bit_length() < 64


def check_prompts(prompts) -> list[list[int]]:
    """The prompts as lists. Raises PromptError for none, an empty one, or text."""
    rows = [as_list(ids) for ids in as_list(prompts)]
    words = "prompts must be a list of lists of ids; encode each text first"
    PromptError.unless(all(is_id(i) for ids in rows for i in ids), words)
    right = "start a text from nothing with the end-of-text token"
    PromptError.unless(rows, f"there are no prompts; {right}")
    for n, ids in enumerate(rows):
        PromptError.unless(ids, f"prompt {n} is empty; {right}")
    return [[int(i) for i in ids] for ids in rows]


def check_search(tokens: torch.Tensor, width: int, length_penalty: float) -> None:
    """Raise PromptError for a search that cannot be.

    More than one prompt, no beams, or a penalty that rewards shortness.
    """
    words = f"beam search takes one prompt (1, T), got {len(tokens)}; call it for each"
    PromptError.unless(len(tokens) == 1, words)
    words = f"width is {width!r}; at least 1 text must be kept"
    PromptError.unless(is_whole(width), words)
    # a comparison with nan is false, so nan is refused too
    words = (
        f"length_penalty is {length_penalty!r}; use 0 for none, or a positive number"
    )
    PromptError.unless(0 <= as_float(length_penalty) < float("inf"), words)


def check_tokenizer(tokenizer) -> None:
    """Raise PromptError for a thing that has not what write_on uses of a Tokenizer."""
    names = ("encode", "decode_bytes", "vocab_size")
    missing = [name for name in names if not hasattr(tokenizer, name)]
    kind, without = type(tokenizer).__name__, ", ".join(missing)
    words = f"the tokenizer is a {kind} without {without}; pass a gpt3lib.Tokenizer"
    PromptError.unless(not missing, words)


def pad_left(prompts: list[list[int]], fill=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of any lengths -> (B, T) ids that end in one column, and (B,) pads.

    A pad counts the empty tracks before a text. fill: the id on empty tracks, at which
    nobody looks. Raises PromptError for no prompts and for an empty one.
    """
    prompts = check_prompts(prompts)
    longest = max(map(len, prompts))
    pad = [longest - len(ids) for ids in prompts]
    rows = [[fill] * n + ids for n, ids in zip(pad, prompts)]
    return torch.tensor(rows), torch.tensor(pad)


def hide_padding(mask: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    """(Tq, Tk) mask, (B,) numbers of empty tracks before each text -> (B, 1, Tq, Tk).

    Nobody looks at an empty track. A query on one has nothing left to look at, so it
    looks at itself; nobody reads what it finds.
    """
    n_queries, n_keys = mask.shape
    columns = torch.arange(n_keys, device=mask.device)
    rows = torch.arange(n_keys - n_queries, n_keys, device=mask.device)
    own = columns == rows[:, None]  # (Tq, Tk)
    filled = columns >= pad[:, None, None, None]  # (B, 1, 1, Tk)
    return mask & filled | own


def until(ids: list[int], stop: int | None) -> list[int]:
    """The ids before the first `stop`; all of them when there is none."""
    return ids[: ids.index(stop)] if stop in ids else ids


def whole_characters(tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as they arrive, never half a character.

    Joined, the pieces are tokenizer.decode(ids).
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        piece = decoder.decode(tokenizer.decode_bytes([i]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def write_on(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    generator=None,
    stop=None,
) -> Iterator[str]:
    """A prompt -> pieces of text that go on with it, each as soon as it is made.

    Pieces are whole characters. stop: an id that ends the text and is not shown. Ids of
    the model that the tokenizer has not are never chosen. Other arguments and errors as
    in generate; errors come at the call, before any piece.
    """
    check_tokenizer(tokenizer)
    home = check_model(model).device
    ids = tokenizer.encode(prompt)
    tokens = torch.tensor([ids], dtype=torch.int64).to(home)
    settings = (temperature, top_k, top_p, generator, stop)
    check_request(model, tokens, max_new_tokens, *settings)
    read = Reader(model, tokens.shape[1] + int(max_new_tokens))

    def known(tokens):
        return read(tokens)[:, : tokenizer.vocab_size]

    steps = stream(known, tokens, max_new_tokens, *settings)
    chosen = (row.item() for row in steps)
    return whole_characters(tokenizer, iter(chosen.__next__, stop))


def penalise(log_probability: float, n_tokens: int, alpha: float) -> float:
    """The score log p / ((5 + n) / 6) ** alpha ([W16] eq. 14, without coverage).

    No token counts as one. As a product it cannot overflow, whatever alpha is.
    """
    return log_probability * (max(5 + n_tokens, 6) / 6) ** -alpha


@torch.no_grad()
def beam_search(model, tokens, max_new_tokens, width=4, length_penalty=0.6, stop=None):
    """(1, T) prompt -> the `width` best continuations, lists of new ids, and scores.

    Best first. A score is log p / ((5 + n) / 6) ** length_penalty, where n counts the
    `stop` that ends a text and is not returned; a text that never ended has
    max_new_tokens ids. Fewer come back when there are no more. Raises PromptError,
    ContextError, TokenError before any work, FloatingPointError for broken logits.
    """
    check_request(model, tokens, max_new_tokens, 0, None, None, stop=stop)
    check_search(tokens, width, length_penalty)
    n_prompt, n, width = tokens.shape[1], 0, int(width)
    max_new_tokens, length_penalty = int(max_new_tokens), float(length_penalty)
    read = Reader(model, n_prompt + max_new_tokens)
    live = torch.zeros(1, device=tokens.device)  # (beams,) log p
    finished = []  # (score, new ids)
    while n < max_new_tokens and len(live):
        logits, n = read(tokens), n + 1  # (beams, vocab_size)
        # numbers come back anyway
        check_logits(logits.amax(dim=-1, keepdim=True).cpu())
        totals = live[:, None] + logits.float().log_softmax(dim=-1)
        if stop is not None:
            finished += scored(totals[:, stop], tokens[:, n_prompt:], n, length_penalty)
            finished = best_first(finished)[:width]
            totals[:, stop] = -torch.inf
        live, best = totals.flatten().topk(min(width, totals.numel()))
        live, best = live[live.isfinite()], best[live.isfinite()]
        parents, new = best // totals.shape[1], best % totals.shape[1]
        tokens = torch.cat([tokens[parents], new[:, None]], dim=1)
        read.select(parents)
        if len(finished) == width and len(live):
            hope = penalise(live.max().item(), max_new_tokens, length_penalty)
            if hope <= finished[-1][0]:
                break
    finished += scored(live, tokens[:, n_prompt:], n, length_penalty)
    finished = best_first(finished)[:width]
    return [ids for _, ids in finished], [score for score, _ in finished]


def scored(totals: torch.Tensor, new: torch.Tensor, n: int, alpha: float) -> list:
    """(B,) log-probabilities and (B, T) new ids -> a list of (score, ids)."""
    texts = zip(totals.tolist(), new.tolist())
    return [(penalise(total, n, alpha), ids) for total, ids in texts]


def best_first(texts: list) -> list:
    """(score, ids) pairs, the highest score first; equal ones keep their order."""
    return sorted(texts, key=lambda text: -text[0])


class PaddedLayer:
    """A layer's cache for texts with empty tracks before them: keys, and who may look.

    cache: returns its keys in the order of the text; pad: (B,) empty tracks;
    bandwidth: how far back the layer sees, None for a dense one.
    """

    def __init__(self, cache, pad: torch.Tensor, bandwidth: int | None):
        self.cache, self.pad, self.bandwidth = cache, pad, bandwidth

    @property
    def length(self) -> int:
        """The number of tracks seen, empty ones included."""
        return self.cache.length

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """Store new keys and values; return those to look at and (B, 1, Tq, Tk) who."""
        n_queries = k.shape[2]
        k, v, _ = self.cache.append(k, v)
        n_keys = k.shape[2]
        mask = banded_mask(n_queries, n_keys, self.bandwidth or n_keys, k.device)
        gone = self.length - n_keys  # a ring has forgotten the first tracks
        return k, v, hide_padding(mask, self.pad - gone)


class PaddedCache(KVCache):
    """A KVCache for texts of different lengths in one batch; pad: (B,) empty tracks."""

    def __init__(self, config, n_slots: int, pad: torch.Tensor):
        super().__init__(config, n_slots, in_order=True)
        self.pad, widths = pad, {"dense": None, "banded": config.bandwidth}
        layers = zip(self.layers, config.kinds)
        self.layers = [PaddedLayer(cache, pad, widths[kind]) for cache, kind in layers]

    def tracks(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) tracks: a text's first token and all before it sit on track 0."""
        return (super().tracks(tokens) - self.pad[:, None]).clamp(min=0)


def read_in_portions(model, tokens, cache, size: int = 256) -> torch.Tensor:
    """last_logits of padded texts, so that no mask is larger than (size, T)."""
    *first, last = tokens.split(size, dim=1)
    for portion in first:
        model.hidden(portion, cache)
    return last_logits(model, last, cache)


class PaddedReader(Reader):
    """A Reader of texts with empty tracks before them; pad: (B,), how many.

    A model that may_cache refuses may not hear the mask either, and reads each alone.
    """

    def __init__(self, model, n_slots: int, pad: torch.Tensor):
        super().__init__(model, n_slots)
        self.pad = pad
        self.cache = PaddedCache(model.config, min(self.n_ctx, n_slots), pad)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """The prompts, in portions, into the cache."""
        return read_in_portions(self.model, tokens, self.cache)

    def slide(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last n_ctx tracks; empty ones are the first to fall out of the window."""
        if not self.cached:
            rows = zip(tokens, self.pad.tolist())
            return torch.cat([Reader.slide(self, row[None, n:]) for row, n in rows])
        left = (self.pad - (tokens.shape[1] - self.n_ctx)).clamp(min=0)
        cache = PaddedCache(self.model.config, self.n_ctx, left)
        return read_in_portions(self.model, tokens[:, -self.n_ctx :], cache)


def generate_many(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> list[list[int]]:
    """Lists of ids, of any lengths -> the new ids of each, up to its first `stop`.

    One batch; with temperature 0 each text is what it would be alone, unless rounding
    decides: a batch may add in another order, and two tokens that are nearly equal may
    then change places; in bfloat16 many are. The stop is not returned. Other arguments
    and errors as in generate.
    """
    home = check_model(model).device
    tokens, pad = (tensor.to(home) for tensor in pad_left(prompts))
    settings = (temperature, top_k, top_p, generator, stop)
    check_request(model, tokens, max_new_tokens, *settings)
    n_slots = tokens.shape[1] + int(max_new_tokens)
    # without empty tracks there is no mask, and a faster kernel
    read = PaddedReader(model, n_slots, pad) if pad.any() else Reader(model, n_slots)
    steps = stream(read, tokens, max_new_tokens, *settings)
    new = [tokens[:, :0], *(chosen[:, None] for chosen in steps)]
    return [until(ids, stop) for ids in torch.cat(new, dim=1).tolist()]
