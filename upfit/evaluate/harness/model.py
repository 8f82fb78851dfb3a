"""A model for lm-evaluation-harness: no prompt is cut to fit, and logits are computed only where they are scored.

The harness's own class for transformers models drops the beginning of a prompt that is too long and continues, and turns the
logits of every position into float32. This one refuses the prompt, and asks the model for logits at the scored positions alone.

Legend: B rows, T their tokens, S scored positions of any of them, V vocabulary.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from upfit.architecture.forwards import LOGITS_TO_KEEP, takes
from upfit.errors import UpfitError
from upfit.output import Meter

UNLIMITED = 2**30  # positions, of an architecture that sets no limit
ROWS_AT_ONCE = 256  # rows of [V] turned to float32 together
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


class Model(HFLM):
    """`most`: positions that the model takes, None for no limit. `progress` (requests) opens a meter of them.

    Raises UpfitError for a tokenizer without an end of text, and, when asked, for what does not fit, naming its task.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch: int, most: int | None, progress: Callable[[int], AbstractContextManager[Meter]]
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UpfitError("--tasks needs a tokenizer with an end-of-text token (eos_token); set it in tokenizer_config.json")
        rows = model.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it stands; it only has to have an embedding
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=most or UNLIMITED, backend="causal"
        )
        self.progress = progress
        self.sparse = takes(model.forward, LOGITS_TO_KEEP)
        self.meter: Meter | None = None
        self.asked: list[str] = []  # the task of each request of a batch

    def refuse_long(self, requests: list[Any]) -> None:
        """Raise UpfitError for the first request that does not fit whole."""
        for request in requests:
            if request.request_type == "generate_until":
                prompt, settings = request.args
                new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
                self._fits(request.task_name, len(self._prompt_ids(prompt)), new, "to generate")
            elif request.request_type == "loglikelihood":
                context, continuation = request.args
                whole = len(self.tok_encode(context + continuation)) + (not context)  # the prefix token stands for no context
                before = len(self.tok_encode(context)) if context else 1
                self._fits(request.task_name, before, whole - before - 1, "of the answer")

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids, _ = self.tok_batch_encode([prompt])
        return list(ids[0].tolist())

    def _fits(self, task: str, tokens: int, more: int, what: str) -> None:
        if tokens + more > self.max_length:
            raise UpfitError(
                f"--tasks {task}: a prompt of {tokens} tokens and {more} {what} do not fit the {self.max_length} positions "
                "the model takes, and nothing is cut; give smaller --task-lengths, or another task"
            )

    @contextlib.contextmanager
    def _told(self, requests: list[Any]) -> Any:
        """A meter of requests that fit."""
        self.refuse_long(requests)
        self.asked = [request.task_name for request in requests]
        with self.progress(len(requests)) as self.meter:
            yield

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._told(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._told(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; a text longer than the model takes is read in stretches, each scored once, as the harness defines."""
        with self._told(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _model_generate(self, context: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        try:
            written = super()._model_generate(context, *rest, **settings)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        if self.meter is not None:
            self.meter.advance(len(context))
        return written

    def _out_of_memory(self) -> UpfitError:
        return UpfitError(f"--tasks does not fit in memory with --batch {self.batch_size}; give a smaller one")

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-likelihood, and whether each of its tokens is the model's first choice.

        Requests that read the same tokens (answers of one token to one question) share a row.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UpfitError(f"--tasks {self.asked[index]}: an answer of no tokens cannot be scored; mend the task")
            alike[(*context, *continuation)[:-1]].append(index)
        rows = sorted(alike, key=lambda row: (-len(row), row))
        scored: dict[int, tuple[float, bool]] = {}
        for at in range(0, len(rows), self.batch_size):
            chosen = rows[at : at + self.batch_size]
            wanted = [[requests[index][2] for index in alike[row]] for row in chosen]
            try:
                scores_of_rows = self._scores(chosen, wanted)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory() from error
            for row, scores in zip(chosen, scores_of_rows, strict=True):
                scored.update(zip(alike[row], scores, strict=True))
                if self.meter is not None:
                    self.meter.advance(len(scores))
        return [scored[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _scores(self, rows: list[tuple[int, ...]], wanted: list[list[list[int]]]) -> list[list[tuple[float, bool]]]:
        """For each row, of each continuation that it ends in (but for its last token): log-likelihood, and whether greedy."""
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # padded behind, where causal models do not look
        for line, row in zip(ids_BT, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        stretches = [range(len(row) - max(map(len, ends)), len(row)) for row, ends in zip(rows, wanted, strict=True)]
        places = sorted({place for stretch in stretches for place in stretch})
        logits_BSV = self._logits(ids_BT.to(self.device), torch.tensor(places, device=self.device))
        scores = []
        for logits_SV, row, ends in zip(logits_BSV, rows, wanted, strict=True):
            first = places.index(len(row) - max(map(len, ends)))
            scores.append([_score(logits_SV[first + max(map(len, ends)) - len(end) :], end) for end in ends])
        return scores

    def _logits(self, ids_BT: torch.Tensor, places_S: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return self.model(input_ids=ids_BT, use_cache=False).logits[:, places_S]
        return self.model(input_ids=ids_BT, use_cache=False, **{LOGITS_TO_KEEP: places_S}).logits


def _score(logits_SV: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """The rows of `logits_SV` from the first on predict the tokens of `continuation`."""
    targets = torch.tensor(continuation, device=logits_SV.device)
    total, greedy = 0.0, True
    for part, tokens in zip(logits_SV[: len(continuation)].split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        total -= float(torch.nn.functional.cross_entropy(part.float(), tokens, reduction="sum"))
        greedy = greedy and bool((part.argmax(-1) == tokens).all())
    return total, greedy
