"""Text comes out one token at a time: choosing the next token, and not computing the past twice."""

# Made from book/06_generation.ipynb by tools/export.py; edit the chapter, not this file.
import functools

import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import ContextError, Embeddings, check_tokens
from gpt3lib.model import GPT, MLP, Block
from gpt3lib.sparse_attention import BandedSelfAttention


def last_logits(model, tokens: torch.Tensor, cache=None, pad=None) -> torch.Tensor:
    """(B, T) ids -> (B, vocab_size): the logits of the last track, which are all that the next token needs."""
    return model.embeddings.unembed(model.hidden(tokens, cache, pad)[:, -1])


def scale(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide by the temperature: below 1 the likely tokens gain, above 1 the unlikely ones.

    The largest logit is moved to 0 first, which changes no probability and keeps tiny temperatures finite.
    """
    largest = logits.max(dim=-1, keepdim=True).values
    return (logits - largest) / max(temperature, 1e-30)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(..., vocab_size) -> the same, everything below the k-th largest logit set to -inf (ties stay; [F18])."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """(..., vocab_size) -> the same, cut to the smallest set of likeliest tokens with probability >= p ([H20]).

    A token stays when the tokens ahead of it hold less than p, so one always stays; p = 1 keeps all.
    """
    if p >= 1:
        return logits  # a sum of thousands of floats may reach 1 too early
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1, dtype=torch.float32)
    drop = probabilities.cumsum(dim=-1) - probabilities >= p
    drop[..., 0] = False
    return torch.empty_like(logits).scatter(-1, order, values.masked_fill(drop, -torch.inf))


class PromptError(ValueError):
    """A prompt with no token in it, or a sampling setting that leaves nothing to sample."""


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise PromptError unless something is left to choose from."""
    if not 0 <= temperature < float("inf"):  # also catches nan
        raise PromptError(f"temperature is {temperature}; use 0 for greedy, or a positive number")
    if top_k is not None and top_k < 1:
        raise PromptError(f"top_k is {top_k}; at least 1 token must stay")
    if top_p is not None and not 0 < top_p <= 1:
        raise PromptError(f"top_p is {top_p}; it must be above 0 and at most 1")


def check_logits(logits: torch.Tensor) -> None:
    """Raise FloatingPointError for (B, vocab_size) logits that are no numbers; on a CPU only."""
    if logits.device.type == "cpu" and not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are not finite; its weights are broken or it overflowed")


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None) -> torch.Tensor:
    """(B, vocab_size) logits -> (B,) token ids.

    temperature=0 takes the likeliest token; otherwise the logits are scaled,
    cut by top_k, then by top_p, and one token is drawn with `generator`.
    Raises PromptError for a wrong setting, FloatingPointError for logits that are no numbers.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits.float()  # thousands of half-precision probabilities would not add up to 1
    check_logits(logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = scale(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def check_request(
    model, tokens, max_new_tokens, temperature, top_k, top_p, generator=None, stop=None, pad=None
) -> None:
    """Everything that can be wrong with a call of generate, said before any work is done."""
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.dim() != 2:
        got = f"shape {tuple(tokens.shape)}" if is_tensor else f"a {type(tokens).__name__}"
        raise PromptError(f"tokens must be a tensor (B, T), got {got}; for one prompt use torch.tensor([ids])")
    if tokens.shape[1] == 0:
        raise PromptError("the prompt is empty; start a text from nothing with the end-of-text token")
    if tokens.shape[1] > model.config.n_ctx:
        raise ContextError(f"the prompt has {tokens.shape[1]} tokens, the context {model.config.n_ctx}; shorten it")
    home = model.embeddings.wte.weight.device
    if tokens.device != home:
        raise PromptError(f"the tokens are on {tokens.device}, the model on {home}; use tokens.to({str(home)!r})")
    check_tokens(tokens.cpu(), model.config.vocab_size)  # one look per request, on any device
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens!r}; it must be 0 or more, a whole number")
    check_settings(temperature, top_k, top_p)
    if generator is not None and generator.device.type != tokens.device.type:
        place = tokens.device.type
        raise PromptError(f"the generator is on {generator.device.type}, the tokens on {place}; put both on one device")
    if stop is not None and (type(stop) is not int or not 0 <= stop < model.config.vocab_size):
        raise PromptError(f"stop is {stop!r}; it must be one token id, 0 to {model.config.vocab_size - 1}")
    if pad is not None:
        check_pad(pad, *tokens.shape)


def check_pad(pad, n_texts: int, n_tokens: int) -> None:
    """Raise PromptError unless pad leaves at least one token of each of (n_texts, n_tokens) prompts."""
    right = isinstance(pad, torch.Tensor) and pad.shape == (n_texts,) and pad.dtype in (torch.int64, torch.int32)
    if not right or (pad < 0).any() or (pad >= n_tokens).any():
        wanted = f"a tensor of {n_texts} whole numbers from 0 to {n_tokens - 1}"
        raise PromptError(f"pad must be {wanted}, one for each prompt; at least one token of it must stay")


@torch.no_grad()
def generate_slowly(model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
    """What generate does, in five lines: read the whole text again for every new token."""
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, generator)
    for _ in range(max_new_tokens):
        seen = tokens[:, -model.config.n_ctx :]  # the window slides: the oldest tokens fall out
        chosen = choose(last_logits(model, seen), temperature, top_k, top_p, generator)  # (B,)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


class LayerCache:
    """The keys and values of one layer, in a tensor that is as long as the text may become."""

    def __init__(self, n_slots: int):
        self.n_slots, self.length = n_slots, 0
        self.keys = self.values = None  # (B, n_heads, n_slots, d_head), made at the first append

    def reserve(self, k: torch.Tensor) -> None:
        """Make the slots, once: number type, device, batch and heads are those of the first keys."""
        if self.keys is None:
            with torch.inference_mode(False):  # slots that any later code may write to
                self.keys = k.new_empty(*k.shape[:2], self.n_slots, k.shape[3])
                self.values = torch.empty_like(self.keys)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys and values (B, n_heads, T, d_head); return all there are so far. Raises ContextError."""
        start, stop = self.length, self.length + k.shape[2]
        if stop > self.n_slots:
            raise ContextError(f"{stop} tokens do not fit into a cache of {self.n_slots} slots; make a larger one")
        self.reserve(k)
        self.keys.narrow(2, start, stop - start).copy_(k)
        self.values.narrow(2, start, stop - start).copy_(v)
        self.length = stop
        return self.keys.narrow(2, 0, stop), self.values.narrow(2, 0, stop)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken twice, which beam search does."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class RingCache(LayerCache):
    """The keys and values of one banded layer: the last `n_slots` only, each new token in the place of the oldest.

    Token c lies in slot c mod n_slots, so memory and time per token do not grow with the text.
    """

    def __init__(self, n_slots: int, in_order: bool = False):
        super().__init__(n_slots)
        self.in_order = in_order

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys and values (B, n_heads, T, d_head); return those that the new tokens may look at.

        In the order of the text, except for a single token, whose softmax does not care (in_order=True: even then).
        """
        self.reserve(k)
        if k.shape[2] == 1 and not self.in_order:
            slot, self.length = self.length % self.n_slots, self.length + 1
            self.keys.narrow(2, slot, 1).copy_(k)
            self.values.narrow(2, slot, 1).copy_(v)
            n_held = min(self.length, self.n_slots)
            return self.keys.narrow(2, 0, n_held), self.values.narrow(2, 0, n_held)
        old = self.slots(min(self.length, self.n_slots - 1), k.device)
        # look first, store then: the new tokens may overwrite what they still have to look at
        seen = torch.cat([self.keys[:, :, old], k], dim=2), torch.cat([self.values[:, :, old], v], dim=2)
        self.length += k.shape[2]
        new = self.slots(min(k.shape[2], self.n_slots), k.device)
        self.keys[:, :, new] = k[:, :, -len(new) :]
        self.values[:, :, new] = v[:, :, -len(new) :]
        return seen

    def slots(self, n: int, device) -> torch.Tensor:
        """(n,) places of the last n tokens, in the order of the text."""
        return torch.arange(self.length - n, self.length, device=device) % self.n_slots


class KVCache:
    """One cache per layer: n_slots long in dense layers, a ring of config.bandwidth slots in banded ones.

    padded: the texts will have empty tracks before them, which need the keys in order.
    """

    def __init__(self, config, n_slots: int, padded: bool = False):
        ring = config.bandwidth < n_slots  # a wider band sees all n_slots
        self.layers = [
            RingCache(config.bandwidth, padded) if kind == "banded" and ring else LayerCache(n_slots)
            for kind in config.kinds
        ]

    @property
    def length(self) -> int:
        """The number of tokens seen."""
        return self.layers[0].length

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order, in every layer."""
        for layer in self.layers:
            layer.select(rows)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight + bias."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


class OneStep:
    """last_logits for one new token per text, as bare products: going through the modules costs part of the time.

    Each weight is a transposed view, no copy; a residual sum is the product's own addition.
    """

    def __init__(self, model):
        self.model, self.layers = model, []
        for block in model.blocks:
            attention, mlp = block.attention, block.mlp
            linears = (attention.wq, attention.wk, attention.wv, attention.wo, mlp.up, mlp.down)
            weights = [(linear.weight.t(), linear.bias) for linear in linears]
            norms = [(norm.weight, norm.bias, norm.eps) for norm in (block.ln_1, block.ln_2)]
            self.layers.append((attention, mlp.activation, *norms, *weights))

    @torch.inference_mode()  # no bookkeeping for gradients at all: these logits are read once and forgotten
    def __call__(self, new: torch.Tensor, cache: KVCache, pad=None) -> torch.Tensor:
        """(B, 1) ids -> (B, vocab_size)."""
        embeddings, ln_f, width = self.model.embeddings, self.model.ln_f, (self.model.config.d_model,)
        track = cache.length if pad is None else cache.length - pad
        x = embeddings.wte.weight[new[:, 0]] + embeddings.wpe.weight[track + embeddings.offset]  # (B, d_model)
        for (attention, bend, ln_1, ln_2, wq, wk, wv, wo, up, down), held in zip(self.layers, cache.layers):
            y = torch.layer_norm(x, width, *ln_1)
            heads = (len(x), -1, 1, attention.d_head)
            q, k, v = (product(y, *linear).view(heads) for linear in (wq, wk, wv))
            k, v = held.append(k, v)
            if pad is None:  # the cache returns what the token may look at, and nothing else
                mixed = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
            else:
                mixed = attention.mix(q, k, v, pad - (held.length - k.shape[2]))
            x = torch.addmm(x, mixed.flatten(1), wo[0]).add_(wo[1])
            y = bend(product(torch.layer_norm(x, width, *ln_2), *up))
            x = torch.addmm(x, y, down[0]).add_(down[1])
        return embeddings.unembed(torch.layer_norm(x, width, ln_f.weight, ln_f.bias, ln_f.eps))


ATTENTION = {CausalSelfAttention, BandedSelfAttention}
OURS = ATTENTION | {GPT, Embeddings, nn.Embedding, nn.ModuleList, Block, MLP, nn.Linear, nn.LayerNorm}


def is_plain(model) -> bool:
    """Whether the model is made of GPT's own parts with nothing hooked to them, so that OneStep may go round them."""
    parts, device = list(model.modules()), model.embeddings.wte.weight.device.type
    hooked = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    return all(type(part) in OURS for part in parts) and not hooked and not torch.is_autocast_enabled(device)


def read_in_portions(model, tokens, cache, pad=None, size: int = 256) -> torch.Tensor:
    """last_logits of a text through a cache; padded texts in portions, so that no mask is larger than (size, T)."""
    portions = [tokens] if pad is None else tokens.split(size, dim=1)
    for portion in portions[:-1]:
        model.hidden(portion, cache, pad)
    return last_logits(model, portions[-1], cache, pad)


class Reader:
    """last_logits of texts that grow by a token per call, each with no more work than it needs.

    n_slots: how long the texts may become; pad: (B,) empty tracks before each, or None.
    """

    def __init__(self, model, n_slots: int, pad=None):
        self.model, self.n_ctx, self.pad = model, model.config.n_ctx, pad
        self.cache = KVCache(model.config, min(self.n_ctx, n_slots), padded=pad is not None)
        self.one_step = OneStep(model) if is_plain(model) else functools.partial(last_logits, model)

    @torch.no_grad()  # OneStep goes further: its logits can never be used in training
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) texts -> (B, vocab_size)."""
        if self.cache.length == 0:
            return read_in_portions(self.model, tokens, self.cache, self.pad)
        if self.cache.length < self.n_ctx:
            return self.one_step(tokens[:, -1:], self.cache, self.pad)
        gone = tokens.shape[1] - self.n_ctx  # the window slides, and empty tracks fall out of it first
        left = None if self.pad is None else (self.pad - gone).clamp(min=0)
        return last_logits(self.model, tokens[:, -self.n_ctx :], pad=left)


def stream(model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, stop=None, pad=None):
    """Yield (B,) new ids, one step at a time, each as soon as it is chosen; what generate does, seen from inside.

    Arguments as in generate, except that nothing is checked here.
    """
    read = Reader(model, tokens.shape[1] + max_new_tokens, pad)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        chosen = choose(read(tokens), temperature, top_k, top_p, generator)  # (B,)
        if stop is not None:
            chosen = torch.where(done, stop, chosen)
            done |= chosen == stop
        yield chosen
        if stop is not None and done.all():
            return
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)


def generate(
    model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, stop=None, pad=None
) -> torch.Tensor:
    """(B, T) prompts -> (B, T + max_new_tokens), one token at a time, with a KV cache.

    temperature=0 is greedy. stop: an id that ends a text; an ended text goes on with it, and the work is over
    when all have ended, so that fewer columns may come back. pad: (B,) empty places before each prompt, for
    prompts of different lengths in one batch.
    Beyond n_ctx the window slides by one token a step; positions are absolute, so every token then moves to
    another track, the cache is worthless, and each step reads the whole window. Raises PromptError,
    ContextError or TokenError before any work.
    """
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, generator, stop, pad)
    ways = (temperature, top_k, top_p, generator, stop, pad)
    new = [chosen[:, None] for chosen in stream(model, tokens, max_new_tokens, *ways)]
    return torch.cat([tokens, *new], dim=1)


def cache_numbers(config, n_tokens: int) -> int:
    """How many numbers the caches hold for one text: a key and a value per layer for each token that it keeps."""
    kept = {"dense": n_tokens, "banded": min(n_tokens, config.bandwidth)}
    return sum(2 * kept[kind] * config.n_heads * config.d_head for kind in config.kinds)
