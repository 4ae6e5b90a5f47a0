"""Text comes out one token at a time: read, choose the next, append it, read again."""

# Made from book/08_generation.ipynb by tools/export.py; edit the chapter.
import torch

from gpt3lib.embeddings import check_tokens
from gpt3lib.files import Refusal, as_float, is_whole


# What is refused; the workshop at the end of this page has a table of it.
class PromptError(Refusal, ValueError):
    """A prompt without a token, or a sampling setting that leaves nothing to sample."""


def check_settings(temperature, top_k, top_p, generator=None) -> None:
    """Raise PromptError unless something is left to choose from, and a die for it."""
    # a comparison with nan is false, so nan is refused too
    words = f"temperature is {temperature!r}; use 0 for greedy, or a positive number"
    PromptError.unless(0 <= as_float(temperature) < float("inf"), words)
    words = f"top_k is {top_k!r}; at least 1 token must stay, a whole number"
    PromptError.unless(top_k is None or is_whole(top_k), words)
    words = f"top_p is {top_p!r}; it must be above 0 and at most 1"
    PromptError.unless(top_p is None or 0 < as_float(top_p) <= 1, words)
    right = "a torch.Generator, such as torch.Generator().manual_seed(0)"
    words = f"generator is {generator!r}; it must be {right}"
    PromptError.unless(isinstance(generator, torch.Generator | None), words)


def check_model(model) -> torch.Tensor:
    """The token table of a model. Raises PromptError for one that cannot read."""
    try:
        table, wpe = model.embeddings.wte.weight, model.embeddings.wpe
        vocab_size, n_ctx = model.config.vocab_size, model.config.n_ctx
    except AttributeError:
        kind = type(model).__name__
        raise PromptError(f"the model is a {kind}; it must be a GPT") from None
    says = f"its config says vocab_size = {vocab_size}; make them equal"
    words = f"the model's token table has {len(table)} rows, {says}"
    PromptError.unless(len(table) == vocab_size, words)
    n_rows = len(getattr(wpe, "weight", range(n_ctx))) - getattr(wpe, "offset", 0)
    says = f"its config says n_ctx = {n_ctx}; every track needs one"
    words = f"the model's position table has {n_rows} rows, {says}"
    PromptError.unless(n_rows >= n_ctx, words)
    words = "the model is on the meta device and has no numbers; load its weights first"
    PromptError.unless(not table.is_meta, words)
    return table


def check_prompt(model, tokens) -> None:
    """Raise PromptError or TokenError unless the model can read on from the tokens."""
    table, right = check_model(model), "for one prompt use torch.tensor([ids])"
    is_tensor = isinstance(tokens, torch.Tensor)
    got = f"shape {tuple(tokens.shape)}" if is_tensor else f"a {type(tokens).__name__}"
    words = f"tokens must be a tensor (B, T), got {got}; {right}"
    PromptError.unless(is_tensor and tokens.dim() == 2, words)
    words = "the prompt is empty; start a text from nothing with the end-of-text token"
    PromptError.unless(tokens.shape[1] > 0, words)
    here, home = tokens.device, table.device
    words = f"the tokens are on {here}, the model on {home}; use tokens.to('{home}')"
    PromptError.unless(here == home, words)
    check_tokens(tokens.cpu(), len(table))  # one look per request, on any device


def check_call(model, tokens, max_new_tokens, temperature, top_k, top_p, generator):
    """Raise PromptError or TokenError for a text that cannot be written."""
    check_prompt(model, tokens)
    PromptError.unless_whole("max_new_tokens", max_new_tokens, least=0)
    here, where = tokens.device.type, getattr(generator, "device", None)
    die = where.type if isinstance(where, torch.device) else here
    words = f"the generator is on {die}, the tokens on {here}; put both on one device"
    PromptError.unless(die == here, words)
    check_settings(temperature, top_k, top_p, generator)


def check_logits(logits: torch.Tensor) -> None:
    """Raise FloatingPointError for (B, vocab_size) logits that are no numbers.

    Only on a CPU: an accelerator would have to wait while a number is read back. Raises
    PromptError for a thing of another shape.
    """
    if getattr(logits, "ndim", 0) != 2 or not isinstance(logits, torch.Tensor):
        raise PromptError("logits must be a tensor (B, vocab_size), one row per text")
    if logits.device.type == "cpu" and not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite; its weights are broken or it overflowed"
        )


def last_logits(model, tokens: torch.Tensor, past=None) -> torch.Tensor:
    """(B, T) ids -> (B, vocab_size): the logits of the last track."""
    return model.embeddings.unembed(model.hidden(tokens, past)[:, -1])


def scale(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide by the temperature: below 1 likely tokens gain, above 1 unlikely ones.

    The largest logit is moved to 0 first, which changes no probability and keeps tiny
    temperatures finite.
    """
    largest = logits.max(dim=-1, keepdim=True).values
    return (logits - largest) / max(float(temperature), 1e-30)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(..., vocab_size) -> the same, all below the k-th largest logit set to -inf.

    Ties with the k-th stay ([F18]).
    """
    check_settings(1.0, k, None)
    kth = logits.topk(min(int(k), logits.shape[-1])).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """(..., vocab_size) -> the same, cut to the fewest likeliest tokens that hold p.

    A token stays when the tokens ahead of it hold less than p ([H20]), so one always
    stays; p = 1 keeps all. A sum within a millionth of p counts as p: float32 logits
    do not tell more.
    """
    check_settings(1.0, None, p)
    if p >= 1:
        return logits  # a sum of thousands of floats may reach 1 too early
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1, dtype=torch.float32)
    ahead = probabilities.cumsum(dim=-1) - probabilities
    drop = ahead >= float(p) - 1e-6
    drop[..., 0] = False
    values = values.masked_fill(drop, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, values)


def choose(
    logits, temperature=1.0, top_k=None, top_p=None, generator=None
) -> torch.Tensor:
    """(B, vocab_size) logits -> (B,) token ids.

    temperature=0 takes the likeliest token; otherwise the logits are scaled, cut by
    top_k, then by top_p, and one token is drawn with `generator`. Raises PromptError
    for a wrong setting, FloatingPointError for logits that are no numbers.
    """
    check_settings(temperature, top_k, top_p, generator)
    check_logits(logits)
    # half-precision probabilities would not add up to 1
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = scale(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate_slowly(
    model,
    tokens,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    generator=None,
):
    """(B, T) prompts -> (B, T + max_new_tokens); each token reads the text anew.

    Raises PromptError or TokenError before any work, FloatingPointError as choose does.
    """
    check_call(model, tokens, max_new_tokens, temperature, top_k, top_p, generator)
    for _ in range(max_new_tokens):
        seen = tokens[:, -model.config.n_ctx :]  # the oldest tokens fall out
        logits = last_logits(model, seen)
        chosen = choose(logits, temperature, top_k, top_p, generator)  # (B,)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens
