"""Text comes out one token at a time: choosing the next token, and not computing the past twice."""

# Made from book/06_generation.ipynb by tools/export.py; edit the chapter, not this file.
import torch

from gpt3lib.embeddings import ContextError, check_tokens


def last_logits(model, tokens: torch.Tensor, cache=None) -> torch.Tensor:
    """(B, T) ids -> (B, vocab_size): the logits of the last track, which are all that the next token needs."""
    return model.embeddings.unembed(model.hidden(tokens, cache)[:, -1])


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


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None) -> torch.Tensor:
    """(B, vocab_size) logits -> (B,) token ids.

    temperature=0 takes the likeliest token; otherwise the logits are scaled,
    cut by top_k, then by top_p, and one token is drawn with `generator`.
    Raises PromptError for a wrong setting, FloatingPointError for logits that are no numbers.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits.float()  # thousands of half-precision probabilities would not add up to 1
    if logits.device.type == "cpu" and not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are not finite; its weights are broken or it overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = scale(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, generator=None) -> None:
    """Everything that can be wrong with a call of generate, said before any work is done."""
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.dim() != 2:
        got = f"shape {tuple(tokens.shape)}" if is_tensor else f"a {type(tokens).__name__}"
        raise PromptError(f"tokens must be a tensor (B, T), got {got}; for one prompt use torch.tensor([ids])")
    if tokens.shape[1] == 0:
        raise PromptError("the prompt is empty; start a text from nothing with the end-of-text token")
    if tokens.shape[1] > model.config.n_ctx:
        raise ContextError(f"the prompt has {tokens.shape[1]} tokens, the context {model.config.n_ctx}; shorten it")
    check_tokens(tokens, model.config.vocab_size)
    if max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    check_settings(temperature, top_k, top_p)
    if generator is not None and generator.device.type != tokens.device.type:
        place = tokens.device.type
        raise PromptError(f"the generator is on {generator.device.type}, the tokens on {place}; put both on one device")


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

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys and values (B, n_heads, T, d_head); return all there are so far. Raises ContextError."""
        start, stop = self.length, self.length + k.shape[2]
        if stop > self.n_slots:
            raise ContextError(f"{stop} tokens do not fit into a cache of {self.n_slots} slots; make a larger one")
        if self.keys is None:
            self.keys = k.new_empty(*k.shape[:2], self.n_slots, k.shape[3])
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, start:stop] = k
        self.values[:, :, start:stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """One LayerCache per layer. 2 · n_layers · d_model numbers for each token it holds."""

    def __init__(self, n_layers: int, n_slots: int):
        self.layers = [LayerCache(n_slots) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """The number of tokens held."""
        return self.layers[0].length


@torch.no_grad()  # not inference_mode: its tensors could never be used in training
def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None) -> torch.Tensor:
    """(B, T) prompts -> (B, T + max_new_tokens), one token at a time, with a KV cache.

    temperature=0 is greedy. Beyond n_ctx the window slides by one token a step;
    positions are absolute, so every token then moves to another track, the cache
    is worthless, and each step reads the whole window. Raises PromptError,
    ContextError or TokenError before any work.
    """
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, generator)
    n_ctx = model.config.n_ctx
    cache = KVCache(model.config.n_layers, min(n_ctx, tokens.shape[1] + max_new_tokens))
    new = tokens
    for _ in range(max_new_tokens):
        fits = cache.length + new.shape[1] <= n_ctx
        logits = last_logits(model, new, cache) if fits else last_logits(model, tokens[:, -n_ctx:])
        new = choose(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
