"""Text comes out one token at a time: read, choose the next, append it, read again."""

# Made from book/08_generation.ipynb by tools/export.py; edit the chapter.
import torch


# What is refused; the workshop at the end of this page has a table of it.
class PromptError(ValueError):
    """A prompt without a token, or a sampling setting that leaves nothing to sample."""


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise PromptError unless something is left to choose from."""
    if not 0 <= temperature < float("inf"):  # also catches nan
        raise PromptError(
            f"temperature is {temperature}; use 0 for greedy, or a positive number"
        )
    if top_k is not None and top_k < 1:
        raise PromptError(f"top_k is {top_k}; at least 1 token must stay")
    if top_p is not None and not 0 < top_p <= 1:
        raise PromptError(f"top_p is {top_p}; it must be above 0 and at most 1")


def check_logits(logits: torch.Tensor) -> None:
    """Raise FloatingPointError for (B, vocab_size) logits that are no numbers.

    Only on a CPU: an accelerator would have to wait while a number is read back.
    """
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
    return (logits - largest) / max(temperature, 1e-30)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(..., vocab_size) -> the same, all below the k-th largest logit set to -inf.

    Ties with the k-th stay ([F18]).
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """(..., vocab_size) -> the same, cut to the fewest likeliest tokens that hold p.

    A token stays when the tokens ahead of it hold less than p ([H20]), so one always
    stays; p = 1 keeps all.
    """
    if p >= 1:
        return logits  # a sum of thousands of floats may reach 1 too early
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1, dtype=torch.float32)
    drop = probabilities.cumsum(dim=-1) - probabilities >= p
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
    check_settings(temperature, top_k, top_p)
    logits = logits.float()  # half-precision probabilities would not add up to 1
    check_logits(logits)
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
    """(B, T) prompts -> (B, T + max_new_tokens); each token reads the text anew."""
    for _ in range(max_new_tokens):
        seen = tokens[:, -model.config.n_ctx :]  # the oldest tokens fall out
        logits = last_logits(model, seen)
        chosen = choose(logits, temperature, top_k, top_p, generator)  # (B,)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens
