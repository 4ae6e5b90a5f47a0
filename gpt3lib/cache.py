"""The past does not change, so keep it: a KV cache, rings for bands, a fast loop."""

# Made from book/09_cache.ipynb by tools/export.py; edit the chapter.
import functools

import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import ContextError, Embeddings
from gpt3lib.files import is_whole
from gpt3lib.generation import PromptError, check_call, choose, last_logits
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
            words = f"{stop} tokens do not fit into a cache of {self.n_slots} slots"
            raise ContextError(f"{words}; make a larger one")
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
        stop = self.length + tokens.shape[1]
        return torch.arange(self.length, stop, device=tokens.device)

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


# torch's parts that treat each track alone, whatever their numbers
ALONE = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity),
    *(nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sequential, nn.ModuleList),
)
KINDS = {"dense": CausalSelfAttention, "banded": BandedSelfAttention}
CALL = ("__call__", "_call_impl", "forward")

# class -> names of the functions that a cache and OneStep rely on; as they are now
KNOWN = {
    **dict.fromkeys((*ALONE, Block, MLP), CALL),
    **dict.fromkeys(KINDS.values(), (*CALL, "heads", "look")),
    Embeddings: (*CALL, "unembed"),
    GPT: ("hidden",),
}
OWN = {(cls, name): getattr(cls, name) for cls in KNOWN for name in KNOWN[cls]}


def is_known(part) -> bool:
    """Whether a part is of a class in KNOWN, on plain tensors, with nothing hung on it.

    Also of a class of this library that is written with one, such as OPT's table, and a
    GPT whose hidden is not another. What torch.compile wraps may be looked into.
    """
    cls = type(part)
    wrapper = cls.__module__ == "torch._dynamo.eval_frame"
    known = cls in KNOWN or wrapper or getattr(cls, "hidden", None) is GPT.hidden
    if issubclass(cls, nn.Embedding) and cls.__call__ is nn.Embedding.__call__:
        known = known or cls.forward.__module__.startswith("gpt3lib.")
    called = {name for name, value in vars(part).items() if callable(value)}
    exchanged = called - {"_compiled_call_impl"} and not wrapper
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    hooks += (part._backward_hooks, part._backward_pre_hooks)
    kinds = {type(getattr(part, name, None)) for name in ("weight", "bias")}
    plain = kinds <= {nn.Parameter, torch.Tensor, type(None)}
    return known and plain and not exchanged and not any(hooks)


def function_of(part):
    """The function inside a table or a GELU that is torch's own, else the part."""
    if type(part) is nn.Embedding and part.max_norm is None:
        return functools.partial(F.embedding, weight=part.weight)
    if type(part) is nn.GELU:
        return functools.partial(F.gelu, approximate=part.approximate)
    return part


def product(x, weight, bias) -> torch.Tensor:
    """x @ weight + bias, if there is one."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def add_product(x, y, weight, bias) -> torch.Tensor:
    """x + y @ weight + bias, if there is one."""
    x = torch.addmm(x, y, weight)
    return x if bias is None else x.add_(bias)


class OneStep:
    """last_logits for one new token per text, as bare products: modules cost time.

    Each weight is a transposed view, no copy; a residual sum is the product's addition.
    Right for a model that is_plain.
    """

    def __init__(self, model):
        self.embeddings, self.ln_f, self.layers = model.embeddings, model.ln_f, []
        self.wte = function_of(model.embeddings.wte)
        self.wpe = function_of(model.embeddings.wpe)
        for block in model.blocks:
            a, mlp = block.attention, block.mlp
            linears = (a.wq, a.wk, a.wv, a.wo, mlp.up, mlp.down)
            weights = [(linear.weight.t(), linear.bias) for linear in linears]
            norms = [(ln.weight, ln.bias, ln.eps) for ln in (block.ln_1, block.ln_2)]
            self.layers.append((a, function_of(mlp.activation), *norms, *weights))

    @torch.inference_mode()  # no notes for gradients: these logits are read once
    def __call__(self, new: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """(B, 1) ids -> (B, vocab_size)."""
        x = (self.wte(new) + self.wpe(cache.tracks(new)))[:, 0]  # (B, d_model)
        width, ln_f = x.shape[1:], self.ln_f
        for layer, held in zip(self.layers, cache.layers):
            attention, bend, ln_1, ln_2, wq, wk, wv, wo, up, down = layer
            y = torch.layer_norm(x, width, *ln_1)
            heads = (len(x), -1, 1, attention.d_head)
            q, k, v = (product(y, *linear).view(heads) for linear in (wq, wk, wv))
            k, v, mask = held.append(k, v)  # all that the token may look at
            mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=attention.scale)
            x = add_product(x, mixed.flatten(1), *wo)
            y = bend(product(torch.layer_norm(x, width, *ln_2), *up))
            x = add_product(x, y, *down)
        x = torch.layer_norm(x, width, ln_f.weight, ln_f.bias, ln_f.eps)
        return self.embeddings.unembed(x)


def uncompiled(part):
    """What torch.compile wrapped, or the part itself."""
    return getattr(part, "_orig_mod", part)


def may_cache(model) -> bool:
    """Whether tokens meet only in GPT's attention, of the kinds that config names.

    Then what is kept of the past stays right. Every part must be known, and no function
    of a known class exchanged since this module was imported.
    """
    model, config = uncompiled(model), model.config
    exchanged = any(getattr(*place) is not OWN[place] for place in OWN)
    if exchanged or nn.modules.module._has_any_global_hook():
        return False
    known = all(map(is_known, model.modules())) and type(model.embeddings) is Embeddings
    blocks = [uncompiled(block) for block in model.blocks]
    if not known or any(type(block) is not Block for block in blocks):
        return False
    looks, widths = [block.attention for block in blocks], {"banded": config.bandwidth}
    found = [(type(look), getattr(look, "bandwidth", None)) for look in looks]
    return found == [(KINDS[kind], widths.get(kind)) for kind in config.kinds]


def is_plain(model) -> bool:
    """Whether OneStep may go round the modules: as GPT makes them, and not compiled."""
    model = uncompiled(model)
    if not may_cache(model) or torch.is_autocast_enabled(
        model.embeddings.wte.weight.device.type
    ):
        return False
    parts = [(model.ln_f, nn.LayerNorm)]
    for block in model.blocks:
        parts += [(block, Block), (block.mlp, MLP)]
        parts += [(ln, nn.LayerNorm) for ln in (block.ln_1, block.ln_2)]
        if type(block.mlp) is MLP:
            a, mlp = block.attention, block.mlp
            linears = (a.wq, a.wk, a.wv, a.wo, mlp.up, mlp.down)
            parts += [(linear, nn.Linear) for linear in linears]
    compiled = any(part._compiled_call_impl for part in model.modules())
    return not compiled and all(type(part) is cls for part, cls in parts)


class Reader:
    """last_logits of texts that grow by a token per call, to n_slots tokens.

    A model is looked at when its reader is made; change it, and make another.
    """

    def __init__(self, model, n_slots: int):
        self.model, self.n_ctx = model, model.config.n_ctx
        self.cache = KVCache(model.config, min(self.n_ctx, n_slots))
        plain, through_modules = is_plain(model), functools.partial(last_logits, model)
        self.cached = plain or may_cache(model)
        self.one_step = OneStep(model) if plain else through_modules

    @torch.no_grad()  # OneStep goes further: its logits can never be used in training
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) texts -> (B, vocab_size)."""
        if self.cached and self.cache.length == 0:
            return self.read(tokens)
        if self.cached and self.cache.length < self.n_ctx:
            return self.one_step(tokens[:, -1:], self.cache)
        return self.slide(tokens)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """The prompt, in one go, into the cache."""
        return last_logits(self.model, tokens, self.cache)

    def slide(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last n_ctx tokens, without a cache: each may sit on another track now."""
        return last_logits(self.model, tokens[:, -self.n_ctx :])

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch, in this order."""
        if self.cached:
            self.cache.select(rows)


def stream(read, tokens, max_new_tokens, temperature, top_k, top_p, generator, stop):
    """Yield (B,) new ids, one step at a time, each as soon as it is chosen.

    read: a Reader; the others as in generate, except that nothing is checked here.
    """
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    stop = None if stop is None else int(stop)  # numpy's too
    for _ in range(int(max_new_tokens)):
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
    and each step reads all of it: tokens change tracks, the cache is worthless. So does
    each step of a model with hooks or parts of another kind (may_cache): right, slow.
    Ids come back as int64; a model with more rows than its tokenizer has ids may choose
    one without a text. Raises PromptError, ContextError or TokenError before any work.
    """
    settings = (temperature, top_k, top_p, generator, stop)
    check_request(model, tokens, max_new_tokens, *settings)
    tokens = tokens.long()
    read = Reader(model, tokens.shape[1] + int(max_new_tokens))
    new = stream(read, tokens, max_new_tokens, *settings)
    return torch.cat([tokens, *(chosen[:, None] for chosen in new)], dim=1)


def check_request(
    model, tokens, max_new_tokens, temperature, top_k, top_p, generator=None, stop=None
) -> None:
    """Everything that can be wrong with a call of generate, said before any work."""
    check_call(model, tokens, max_new_tokens, temperature, top_k, top_p, generator)
    n, n_ctx = tokens.shape[1], model.config.n_ctx
    if n > n_ctx:
        raise ContextError(
            f"the prompt has {n} tokens, the context {n_ctx}; shorten it"
        )
    last = model.config.vocab_size - 1
    words = f"stop is {stop!r}; it must be one token id, 0 to {last}"
    PromptError.unless(stop is None or is_whole(stop, least=0) and stop <= last, words)
