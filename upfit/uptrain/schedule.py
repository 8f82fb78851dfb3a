"""How a token budget becomes steps, and the learning rate of each step: pure functions, no torch."""

import math
from dataclasses import dataclass

from upfit import options
from upfit.errors import UpfitError
from upfit.uptrain.config import Config, budget

DEFAULT_LENGTH = 2048
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 4096, 524_288
DEFAULT_STEPS, FEWEST_STEPS = 100, 50
RATE_TIMES_HIDDEN = 0.2  # the peak learning rate falls with the width of the model
ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Plan:
    """The size of a run: `length` tokens a row, `rows` a step (over all processes), `steps` steps."""

    length: int
    rows: int
    steps: int

    @property
    def tokens_a_step(self) -> int:
        return self.rows * self.length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_a_step


def make_plan(config: Config, longest: int | None) -> Plan:
    """The plan for `config` and a model that takes rows of at most `longest` tokens (None: no limit known).

    Raises UpfitError when the budget is missing or the row is longer than the model takes.
    """
    tokens = budget(config)
    length = config.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and length > longest:
        raise UpfitError(f"--length {length} is longer than the model's {longest} positions; choose {longest} or less")
    if config.batch_tokens is None:
        # Small batches are better than few steps, and a hundred steps better than a batch of one row.
        wanted = min(max(tokens // DEFAULT_STEPS, min(MIN_BATCH_TOKENS, tokens // FEWEST_STEPS)), MAX_BATCH_TOKENS)
        rows = max(1, wanted // length)
    else:
        wanted = options.parse_count(config.batch_tokens, "--batch-tokens")
        if wanted < length:
            raise UpfitError(f"--batch-tokens {wanted} is less than one row of {length} tokens; raise it or lower --length")
        rows = wanted // length
    return Plan(length, rows, max(1, math.ceil(tokens / (rows * length))))


def peak_rate(config: Config, hidden_size: int) -> float:
    return config.learning_rate if config.learning_rate is not None else RATE_TIMES_HIDDEN / hidden_size


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float, min_rate: float) -> float:
    """Warm-up, stable, decay: the learning rate of step `step` (from 0) of `steps`.

    Rises linearly over `warmup · steps` steps, stays at `peak`, and falls over the last `decay · steps` steps as
    1 − √progress (Hägele et al. 2024, arXiv:2405.18392) to `min_rate · peak`.
    """
    rising, falling = math.ceil(warmup * steps), math.ceil(decay * steps)
    factor = min(1.0, (step + 1) / rising) if rising else 1.0
    done = step - (steps - falling)
    if done >= 0 and falling:
        fallen = 1 - math.sqrt((done + 1) / (falling + 1))
        factor = min(factor, min_rate + (1 - min_rate) * fallen)
    return peak * factor
