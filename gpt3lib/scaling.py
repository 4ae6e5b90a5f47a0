"""FLOPs, bytes and dollars: what training costs, and how the loss falls as it grows."""

# Made from book/16_scaling_laws.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt3lib.cache import cache_numbers
from gpt3lib.files import Refusal, as_float
from gpt3lib.model import GPTConfig
from gpt3lib.runs import flops_per_token


# What is refused; the workshop at the end of this page has a table of it.
class ScalingError(Refusal, ValueError):
    """Work, a machine or measured losses that cannot be; says what would be right."""


def positive(name: str, value) -> float:
    """The value as a float, if it is a number above 0. Raises ScalingError."""
    number = as_float(value)
    words = f"{name} is {value!r}; it must be a number above 0"
    ScalingError.unless(0 < number < math.inf, words)
    return number


def as_share(name: str, value, most: str = "at most 1") -> float:
    """The value as a float above 0 and at most, or below, 1. Raises ScalingError."""
    number, below = as_float(value), most != "at most 1"
    words = f"{name} is {value!r}; it must be a share, above 0 and {most}"
    ScalingError.unless(0 < number < 1 or (number == 1 and not below), words)
    return number


def check_shape(config) -> None:
    """Raise ScalingError unless this is a GPTConfig."""
    right = "a GPTConfig, such as GPTConfig.from_name('gpt3-175b')"
    words = f"config is {config!r:.60}; it must be {right}"
    ScalingError.unless(isinstance(config, GPTConfig), words)


def check_points(x: Iterable, y: Iterable, floor: float) -> tuple:
    """x and y as arrays of equally many numbers above 0. Raises ScalingError."""
    x, y = (
        [as_float(v.item() if hasattr(v, "item") else v) for v in s] for s in (x, y)
    )
    words = f"{len(x)} x and {len(y)} y; give one y for each x"
    ScalingError.unless(len(x) == len(y), words)
    words = f"{len(set(x))} different x; a line with an interval needs 3 at least"
    ScalingError.unless(len(set(x)) >= 3, words)
    words = "x and y must be finite numbers above 0, for their logarithms are fitted"
    ScalingError.unless(all(0 < value < math.inf for value in x + y), words)
    words = f"floor is {floor!r}; it must be from 0 to below the lowest y, {min(y):g}"
    ScalingError.unless(0 <= as_float(floor) < min(y), words)
    return np.array(x), np.array(y)


def n_params(config: GPTConfig, embeddings: bool = True) -> int:
    """Parameters of a model, counted without making it; or those of its layers only.

    The last norm goes with the layers. Raises ScalingError.
    """
    check_shape(config)
    d = config.d_model
    layers = config.n_layers * (12 * d**2 + 13 * d) + 2 * d  # 13: biases and norms
    return layers + embeddings * (config.vocab_size + config.n_ctx) * d


def flops_by_convention(config: GPTConfig) -> dict[str, int]:
    """FLOPs to learn from one token, forward and backward, as they are counted.

    6N: six for each parameter ([B20] Table D.1). layers: without the embeddings
    ([K20], [B20] Fig. 3.1). dense: all matrix products, each query with n_ctx keys;
    what torch's counter counts, and most reports of MFU. actual: with those keys only
    that the masks let through; the chapter Long runs' flops_per_token. Raises
    ScalingError.
    """
    check_shape(config)
    d, n_layers = config.d_model, config.n_layers
    matrices = 12 * n_layers * d**2 + config.vocab_size * d
    return {
        "6N": 6 * n_params(config),
        "layers": 6 * n_params(config, embeddings=False),
        "dense": 6 * matrices + 12 * n_layers * d * config.n_ctx,
        "actual": flops_per_token(config),
    }


def training_flops(config: GPTConfig, n_tokens: float, by: str = "6N") -> float:
    """FLOPs to train a model on n_tokens; by: see flops_by_convention.

    Raises ScalingError.
    """
    found = flops_by_convention(config)
    words = f"by is {by!r}; it must be one of {', '.join(found)}"
    ScalingError.unless(by in found, words)
    return float(found[by]) * positive("n_tokens", n_tokens)


PF_DAY = 1e15 * 86_400  # FLOPs of a machine of 10¹⁵ FLOP/s in a day


def pf_days(flops: float) -> float:
    """FLOPs in petaflop/s-days. Raises ScalingError."""
    return positive("flops", flops) / PF_DAY


def gpu_seconds(flops: float, peak: float, mfu: float = 1.0) -> float:
    """Seconds of one GPU that can do `peak` FLOP/s and reaches the share mfu of it.

    Raises ScalingError.
    """
    reached = positive("peak", peak) * as_share("mfu", mfu)
    return positive("flops", flops) / reached


def gpu_years(flops: float, peak: float, mfu: float = 1.0) -> float:
    """The same in years of 365.25 days. Raises ScalingError."""
    return gpu_seconds(flops, peak, mfu) / (365.25 * 86_400)


def cost(flops: float, peak: float, per_hour: float, mfu: float = 1.0) -> float:
    """What the GPUs cost, at a price per GPU and hour. Raises ScalingError."""
    return gpu_seconds(flops, peak, mfu) / 3600 * positive("per_hour", per_hour)


def training_days(flops: float, peak: float, n_gpus: int, mfu: float = 1.0) -> float:
    """Days of n_gpus that share the work. Raises ScalingError."""
    n_gpus = ScalingError.unless_whole("n_gpus", n_gpus)
    return gpu_seconds(flops, peak, mfu) / n_gpus / 86_400


def t_quantile(dof: int, level: float = 0.95) -> float:
    """Student's t: so many standard errors to both sides hold `level` of the cases.

    With t = √dof · tan θ its density is cos^(dof - 1) θ, which is summed here.
    """
    edges = np.linspace(0, np.pi / 2, 20_001)
    weights = np.cos((edges[1:] + edges[:-1]) / 2) ** (dof - 1)
    share = np.concatenate([[0], np.cumsum(weights) / weights.sum()])
    return float(np.sqrt(dof) * np.tan(np.interp(level, share, edges)))


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + a · x^-alpha; alpha lies from low to high, at the fit's level."""

    a: float
    alpha: float
    low: float
    high: float
    floor: float = 0.0

    def __call__(self, x):
        """What the law says at x, a number or an array."""
        return self.floor + self.a * x**-self.alpha


def fit_power_law(x, y, floor: float = 0.0, level: float = 0.95) -> PowerLaw:
    """The power law through measured points: a straight line through the logarithms.

    The interval is the line's own: from how far the points lie off it, by Student's t.
    floor: what x cannot take away, which must be known. Raises ScalingError.
    """
    level = as_share("level", level, "below 1")
    x, y = check_points(x, y, floor)
    u, v = np.log(x), np.log(y - floor)
    du, dv = u - u.mean(), v - v.mean()
    slope = float((du * dv).sum() / (du**2).sum())
    dof = len(x) - 2  # two numbers were taken from the points
    error = math.sqrt(((dv - slope * du) ** 2).sum() / dof / (du**2).sum())
    half = t_quantile(dof, level) * error
    a = math.exp(v.mean() - slope * u.mean())
    return PowerLaw(a, -slope, -slope - half, -slope + half, float(floor))


def frontier(points: Iterable[tuple]) -> list[tuple]:
    """Of points (compute, loss, …) those that no cheaper one equals or beats."""
    best, found = math.inf, []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            found.append(point)
    return found


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = e + a / N^alpha + b / D^beta, nats a token ([H22] approach 3)."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, n, d):
        """The loss of a model with n parameters that has read d tokens."""
        return self.e + self.a / n**self.alpha + self.b / d**self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss that 6 N D = flops can buy. Raises ScalingError."""
        product = positive("flops", flops) / 6
        both = self.alpha + self.beta
        ratio = self.alpha * self.a / (self.beta * self.b)
        n = ratio ** (1 / both) * product ** (self.beta / both)
        return n, product / n


HOFFMANN = LossLaw(1.69, 406.4, 0.34, 410.7, 0.28)  # as printed in [H22]
BESIROGLU = LossLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658)  # fitted again, [B24]


def chinchilla_optimal(flops: float, ratio: float = 20.0) -> tuple[float, float]:
    """(N, D) with 6 N D = flops and `ratio` tokens for each parameter [H22].

    Raises ScalingError.
    """
    n = math.sqrt(positive("flops", flops) / (6 * positive("ratio", ratio)))
    return n, ratio * n


class Work(NamedTuple):
    """What a computation does (FLOPs) and what it moves to and from memory (bytes)."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least time on a machine of peak FLOP/s and bandwidth bytes/s.

        Raises ScalingError.
        """
        moving = self.bytes / positive("bandwidth", bandwidth)
        return max(self.flops / positive("peak", peak), moving)


def product_work(m: int, k: int, n: int, width: int = 2) -> Work:
    """A matrix product (m, k) · (k, n) of numbers of `width` bytes, each moved once."""
    return Work(2 * m * k * n, width * (m * k + k * n + m * n))


def decode_work(config: GPTConfig, batch: int, length: int, width: int = 2) -> Work:
    """One new token for each of `batch` texts that are `length` long, with caches.

    All weights are read once, and the keys and values of each text. Raises
    ScalingError.
    """
    check_shape(config)
    batch = ScalingError.unless_whole("batch", batch)
    length = ScalingError.unless_whole("length", length)
    weights = n_params(config) - config.n_ctx * config.d_model  # of positions one row
    kept = cache_numbers(config, length)  # each met by one multiply-add
    return Work(2.0 * batch * (weights + kept), width * float(weights + batch * kept))
