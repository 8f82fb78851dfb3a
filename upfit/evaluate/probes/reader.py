"""Reads a long text once, in chunks, and asks about it many times: each question gets a copy of the cache that the text filled.

Memory is bounded by the cache and one chunk. Logits are computed only where they are wanted.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upfit.errors import UpfitError
from upfit.evaluate.cache import NO_CACHE, CachedModel
from upfit.evaluate.load import LEAK_SHARE, LEAK_SHARE_COARSE
from upfit.longcontext.probes.contexts import SPARE

CHUNK = 512  # tokens fed together
CHECKED = 48  # tokens that the check reads in one piece and in three


@dataclass(frozen=True)
class Reply:
    """`generated`: the tokens of the greedy answer, without what ended it. `nats`: loss of the true answer, a token."""

    generated: list[int]
    nats: float


def check_goes_on(run: CachedModel, ids_BT: torch.Tensor) -> None:
    """Raise UpfitError when the model does not go on from its cache as if it had read the beginning of `ids_BT` at once."""
    ids = ids_BT[:, :CHECKED]
    whole, cache = run(ids)
    if cache is None:
        raise UpfitError(f"long-context probes read a text in pieces, and {NO_CACHE}; leave these probes out")
    pieced, held = whole, None
    for part in ids.split(-(-ids.shape[1] // 3), 1):
        pieced, held = run(part, copy.deepcopy(held))
    if (pieced - whole).abs().max() > LEAK_SHARE.get(run.model.dtype, LEAK_SHARE_COARSE) * whole.abs().max():
        raise UpfitError(
            "long-context probes read a text in pieces, and this model does not go on from its cache as if it had read all at "
            "once; leave these probes out"
        )


class Reader:
    """Reads contexts and answers questions with one model; `ends` are tokens that end an answer, as the end of a line does.

    Raises UpfitError when the model does not go on from its cache as if it had read everything at once.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: np.ndarray) -> None:
        self.run, self.device, self.tokenizer = CachedModel(model), model.device, tokenizer
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        check_goes_on(self.run, self._row(ids))

    def _row(self, ids: np.ndarray | list[int]) -> torch.Tensor:
        return torch.as_tensor(ids, dtype=torch.long, device=self.device)[None]

    def read(self, ids: np.ndarray) -> Any:
        """The cache that the tokens [T] fill."""
        cache = None
        for part in self._row(ids).split(CHUNK, 1):
            _, cache = self.run(part, cache)
        return cache

    def answer(self, cache: Any, asks: np.ndarray, answer: np.ndarray) -> Reply:
        """What the model says after what was read and `asks`, greedily, at most as long as `answer` and SPARE tokens more.

        The true answer is fed as a whole, for its loss. As far as the model's first choices agree with it, it is the greedy
        answer too, and only what comes after has to be made token by token.
        """
        first, asked = self.run(self._row(asks), copy.deepcopy(cache))
        wanted = self._row(answer)
        rest, _ = self.run.logits(wanted, copy.deepcopy(asked), len(answer))
        logits = torch.cat([first[:, None], rest], 1)[0].float()
        nats = float(torch.nn.functional.cross_entropy(logits[:-1], wanted[0]))
        choices = logits.argmax(-1).tolist()
        pairs = zip(choices, answer.tolist(), strict=False)
        agreed = next((index for index, (own, true) in enumerate(pairs) if own != true), len(answer))
        return Reply(self._go_on(asked, choices[: agreed + 1], len(answer) + SPARE), nats)

    def _go_on(self, cache: Any, generated: list[int], most: int) -> list[int]:
        """Greedy from what is said on, up to an end token, the end of a line or `most` tokens; without the end token."""
        following = self._row(generated)
        while (
            len(generated) < most and generated[-1] not in self.ends and "\n" not in self.tokenizer.decode(generated).lstrip()
        ):
            logits, cache = self.run(following, cache)
            following = logits.argmax(-1, keepdim=True)
            generated = [*generated, int(following)]
        return generated[:-1] if generated[-1] in self.ends else generated
