"""The past does not change, so keep it: a KV cache, rings for bands, a fast loop."""

# Made from book/09_cache.ipynb by tools/export.py; edit the chapter.
import functools

import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import ContextError, check_tokens
from gpt3lib.generation import PromptError, check_settings, choose, last_logits
from gpt3lib.model import GPT, MLP, Block
from gpt3lib.sparse_attention import BandedSelfAttention


class LayerCache:
    """The keys and values of one layer, in a tensor as long as the text may become."""

    def __init__(self, n_slots: int):
        self.n_slots, self.length = n_slots, 0
        self.keys = self.values = None  # (B, n_heads, n_slots, d_head)

    def reserve(self, k: torch.Tensor) -> None:
        """Make the slots, once, with the number type, device, batch and heads of k."""
        if self.keys is None:
            with torch.inference_mode(False):  # slots that any later code may write to
                self.keys = k.new_empty(*k.shape[:2], self.n_slots, k.shape[3])
                self.values = torch.empty_like(self.keys)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """Store T new keys and values (B, n_heads, T, d_head).

        Returns all keys and values so far, and no mask. Raises ContextError.
        """
        start, stop = self.length, self.length + k.shape[2]
        if stop > self.n_slots:
            raise ContextError(
                f"{stop} tokens do not fit into a cache of {self.n_slots} slots; "
                "make a larger one"
            )
        self.reserve(k)
        self.keys.narrow(2, start, stop - start).copy_(k)
        self.values.narrow(2, start, stop - start).copy_(v)
        self.length = stop
        return self.keys.narrow(2, 0, stop), self.values.narrow(2, 0, stop), None

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; beam search takes some twice."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """Keys and values of all layers. in_order: in the text's order, as a mask needs."""

    def __init__(self, config, n_slots: int, in_order: bool = False):
        self.layers = []
        for kind in config.kinds:
            ring = kind == "banded" and config.bandwidth < n_slots
            one = RingCache(config.bandwidth, in_order) if ring else LayerCache(n_slots)
            self.layers.append(one)

    @property
    def length(self) -> int:
        """The number of tokens seen."""
        return self.layers[0].length

    def tracks(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) new ids -> (T,) tracks they sit on: those after the tokens seen."""
        return self.length + torch.arange(tokens.shape[1], device=tokens.device)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order, in every layer."""
        for layer in self.layers:
            layer.select(rows)


def cache_numbers(config, n_tokens: int) -> int:
    """How many numbers the caches hold for one text of n_tokens.

    A key and a value per layer for each token that the layer keeps.
    """
    kept = {"dense": n_tokens, "banded": min(n_tokens, config.bandwidth)}
    return sum(2 * kept[kind] * config.n_heads * config.d_head for kind in config.kinds)


class RingCache(LayerCache):
    """The keys and values of one banded layer: of the last n_slots tokens only.

    Token c lies in slot c mod n_slots, in the place of the oldest, so memory and time
    per token do not grow with the text.
    """

    def __init__(self, n_slots: int, in_order: bool = False):
        super().__init__(n_slots)
        self.in_order = in_order

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """Store T new keys and values (B, n_heads, T, d_head).

        Returns those that the new tokens may look at, and no mask. They are in the
        order of the text, except for a single token (in_order=True: even then).
        """
        self.reserve(k)
        if k.shape[2] == 1 and not self.in_order:
            return self.append_one(k, v)
        old = self.slots(min(self.length, self.n_slots - 1))
        # look first, store then: new tokens may overwrite what they still have to see
        keys = torch.cat([self.keys[:, :, old], k], dim=2)
        values = torch.cat([self.values[:, :, old], v], dim=2)
        self.length += k.shape[2]
        new = self.slots(min(k.shape[2], self.n_slots))
        self.keys[:, :, new] = k[:, :, -len(new) :]
        self.values[:, :, new] = v[:, :, -len(new) :]
        return keys, values, None

    def append_one(self, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """The same for one token, whose softmax does not care about the order."""
        slot, self.length = self.length % self.n_slots, self.length + 1
        self.keys.narrow(2, slot, 1).copy_(k)
        self.values.narrow(2, slot, 1).copy_(v)
        n = min(self.length, self.n_slots)
        return self.keys.narrow(2, 0, n), self.values.narrow(2, 0, n), None

    def slots(self, n: int) -> torch.Tensor:
        """(n,) places of the last n tokens, in the order of the text."""
        start, stop = self.length - n, self.length
        return torch.arange(start, stop, device=self.keys.device) % self.n_slots


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight + bias."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


class OneStep:
    """last_logits for one new token per text, as bare products: modules cost time.

    Each weight is a transposed view, no copy; a residual sum is the product's addition.
    """

    def __init__(self, model):
        self.model, self.layers = model, []
        for block in model.blocks:
            a, mlp = block.attention, block.mlp
            linears = (a.wq, a.wk, a.wv, a.wo, mlp.up, mlp.down)
            weights = [(linear.weight.t(), linear.bias) for linear in linears]
            norms = [(ln.weight, ln.bias, ln.eps) for ln in (block.ln_1, block.ln_2)]
            self.layers.append((a, mlp.activation, *norms, *weights))

    @torch.inference_mode()  # no notes for gradients: these logits are read once
    def __call__(self, new: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """(B, 1) ids -> (B, vocab_size)."""
        embeddings, ln_f = self.model.embeddings, self.model.ln_f
        x = embeddings(new, cache.tracks(new))[:, 0]  # (B, d_model)
        width = x.shape[1:]
        for layer, held in zip(self.layers, cache.layers):
            attention, bend, ln_1, ln_2, wq, wk, wv, wo, up, down = layer
            y = torch.layer_norm(x, width, *ln_1)
            heads = (len(x), -1, 1, attention.d_head)
            q, k, v = (product(y, *linear).view(heads) for linear in (wq, wk, wv))
            k, v, mask = held.append(k, v)  # all that the token may look at
            mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=attention.scale)
            x = torch.addmm(x, mixed.flatten(1), wo[0]).add_(wo[1])
            y = bend(product(torch.layer_norm(x, width, *ln_2), *up))
            x = torch.addmm(x, y, down[0]).add_(down[1])
        x = torch.layer_norm(x, width, ln_f.weight, ln_f.bias, ln_f.eps)
        return embeddings.unembed(x)


WALKED_ROUND = {
    Block,
    MLP,
    CausalSelfAttention,
    BandedSelfAttention,
    nn.Linear,
    nn.LayerNorm,
}


def is_plain(model) -> bool:
    """Whether OneStep may go round the parts: GPT's own, nothing hooked to them."""
    device = model.embeddings.wte.weight.device.type
    if type(model).hidden is not GPT.hidden or torch.is_autocast_enabled(device):
        return False
    if not all(
        type(block) is Block and type(block.mlp) is MLP for block in model.blocks
    ):
        return False
    called = [model.embeddings, *(block.mlp.activation for block in model.blocks)]
    parts = [part for block in model.blocks for part in block.modules()]
    return not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or "forward" in vars(part)
        or (part is not model and type(part) not in WALKED_ROUND)
        for part in [model, model.ln_f, *parts]
        if not any(part is other for other in called)
    )


class Reader:
    """last_logits of texts that grow by a token per call, to n_slots tokens."""

    def __init__(self, model, n_slots: int):
        self.model, self.n_ctx = model, model.config.n_ctx
        self.cache = KVCache(model.config, min(self.n_ctx, n_slots))
        through_modules = functools.partial(last_logits, model)
        self.one_step = OneStep(model) if is_plain(model) else through_modules

    @torch.no_grad()  # OneStep goes further: its logits can never be used in training
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) texts -> (B, vocab_size)."""
        if self.cache.length == 0:
            return self.read(tokens)
        if self.cache.length < self.n_ctx:
            return self.one_step(tokens[:, -1:], self.cache)
        return self.slide(tokens)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """The prompt, in one go, into the cache."""
        return last_logits(self.model, tokens, self.cache)

    def slide(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last n_ctx tokens, without a cache: each sits on another track now."""
        return last_logits(self.model, tokens[:, -self.n_ctx :])


def stream(read, tokens, max_new_tokens, temperature, top_k, top_p, generator, stop):
    """Yield (B,) new ids, one step at a time, each as soon as it is chosen.

    read: a Reader; the others as in generate, except that nothing is checked here.
    """
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
    model,
    tokens: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> torch.Tensor:
    """(B, T) prompts -> (B, T + max_new_tokens), one token at a time, with a KV cache.

    temperature=0 is greedy. stop: an id that ends a text; ended texts go on with it
    until all have ended, so fewer columns may come back. Beyond n_ctx the window slides
    and each step reads all of it: tokens change tracks, the cache is worthless. Raises
    PromptError, ContextError or TokenError before any work.
    """
    settings = (temperature, top_k, top_p, generator, stop)
    check_request(model, tokens, max_new_tokens, *settings)
    read = Reader(model, tokens.shape[-1] + max_new_tokens)
    new = stream(read, tokens, max_new_tokens, *settings)
    return torch.cat([tokens, *(chosen[:, None] for chosen in new)], dim=1)


def check_request(
    model, tokens, max_new_tokens, temperature, top_k, top_p, generator=None, stop=None
) -> None:
    """Everything that can be wrong with a call of generate, said before any work."""
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.dim() != 2:
        kind = f"a {type(tokens).__name__}"
        got = f"shape {tuple(tokens.shape)}" if is_tensor else kind
        raise PromptError(
            f"tokens must be a tensor (B, T), got {got}; "
            "for one prompt use torch.tensor([ids])"
        )
    if tokens.shape[1] == 0:
        raise PromptError(
            "the prompt is empty; start a text from nothing with the end-of-text token"
        )
    n_ctx, vocab_size = model.config.n_ctx, model.config.vocab_size
    if tokens.shape[1] > n_ctx:
        raise ContextError(
            f"the prompt has {tokens.shape[1]} tokens, the context {n_ctx}; shorten it"
        )
    home = model.embeddings.wte.weight.device
    if tokens.device != home:
        raise PromptError(
            f"the tokens are on {tokens.device}, the model on {home}; "
            f"use tokens.to({str(home)!r})"
        )
    check_tokens(tokens.cpu(), vocab_size)  # one look per request, on any device
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise PromptError(
            f"max_new_tokens is {max_new_tokens!r}; "
            "it must be 0 or more, a whole number"
        )
    check_settings(temperature, top_k, top_p)
    if generator is not None and generator.device.type != tokens.device.type:
        raise PromptError(
            f"the generator is on {generator.device.type}, the tokens on "
            f"{tokens.device.type}; put both on one device"
        )
    if stop is not None and (type(stop) is not int or not 0 <= stop < vocab_size):
        raise PromptError(
            f"stop is {stop!r}; it must be one token id, 0 to {vocab_size - 1}"
        )
