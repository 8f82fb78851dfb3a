"""How a token budget becomes steps, and the learning rate of each step: pure functions, no torch."""

import math
from dataclasses import dataclass

from upfit.errors import UpfitError
from upfit.uptrain.config import Config, budget, count_of

DEFAULT_LENGTH = 2048
MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_CPU = 8192, 2048
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 4096, 524_288
DEFAULT_STEPS, FEWEST_STEPS = 100, 50
RATE_TIMES_HIDDEN = 0.2  # the peak learning rate falls with the width of the model
CAREFUL = 0.2  # of the rate, for a healthy model; measured in benchmarks/results/2026-11-22-recovery-embedded.json
STAGE_RATES = {  # in units of that
    "answers": 0.1,  # a step has a few hundred labels, and a healthy model is not to be pulled apart by them
}
ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Plan:
    """The size of a run: `length` tokens a row (of answers: on average), `rows` a step (over all processes), `steps` steps; and
    rows of general text mixed in."""

    length: int
    rows: int
    steps: int
    mix_length: int = 0
    mix_rows: int = 0

    @property
    def tokens_a_step(self) -> int:
        return self.rows * self.length + self.mix_rows * self.mix_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_a_step


def make_plan(config: Config, longest: int | None) -> Plan:
    """The plan for `config` and a model that takes rows of at most `longest` tokens (None: no limit known).

    Raises UpfitError when the budget is missing or the row is longer than the model takes.
    """
    tokens, length = budget(config), row_length(config.length, longest)
    if config.batch_tokens is not None and count_of(config, "batch_tokens") < length:
        short = f"--batch-tokens {config.batch_tokens} is less than one row of {length} tokens"
        raise UpfitError(f"{short}; raise it or lower --length")
    rows = max(1, step_tokens(config, tokens) // length)
    return Plan(length, rows, max(1, math.ceil(tokens / (rows * length))))


def row_length(asked: int | None, longest: int | None) -> int:
    """Tokens of a row of text, `asked` if any. Raises UpfitError for more than `longest`, what the model takes (None: any)."""
    length = asked or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and length > longest:
        raise UpfitError(f"--length {length} is longer than the model's {longest} positions; choose {longest} or less")
    return length


def step_tokens(config: Config, tokens: int) -> int:
    """Tokens of a step of a run of `tokens`."""
    if config.batch_tokens is not None:
        return count_of(config, "batch_tokens")
    # Small batches are better than few steps, and a hundred steps better than a batch of one row.
    return min(max(tokens // DEFAULT_STEPS, min(MIN_BATCH_TOKENS, tokens // FEWEST_STEPS)), MAX_BATCH_TOKENS)


def make_answers_plan(config: Config, examples: int, mean_length: int, longest: int | None) -> Plan:
    """The plan for `examples` questions of `mean_length` tokens: once over all of them where no budget is given.

    With `mix`, rows of text make up `mix_share` of a step's tokens, at least one row.
    """
    mixed = config.mix is not None
    share = config.mix_share if mixed else 0.0
    is_set = config.tokens is not None or config.share is not None
    tokens = budget(config) if is_set else round(examples * mean_length / (1 - share))
    length = row_length(config.length, longest) if mixed else 0
    wanted = step_tokens(config, tokens)
    rows = min(examples, max(1, round(wanted * (1 - share) / mean_length)))
    mix_rows = max(1, round(rows * mean_length * share / (1 - share) / length)) if mixed else 0
    return Plan(mean_length, rows, max(1, math.ceil(tokens / (rows * mean_length + mix_rows * length))), length, mix_rows)


def peak_rate(config: Config, hidden_size: int, stage: str, healthy: bool = False) -> float:
    """The peak learning rate; by default a fifth for the text alone where the model is `healthy`, with little to win back."""
    if config.learning_rate is not None:
        return config.learning_rate
    return RATE_TIMES_HIDDEN / hidden_size * STAGE_RATES.get(stage, CAREFUL if healthy and stage == "lm" else 1.0)


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
