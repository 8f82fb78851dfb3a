"""Turns documents into token ids, several batches at a time and in order.

The tokenizers of Hugging Face release Python's lock, so threads are enough: nothing is copied between processes, and nothing is
left behind when this one is killed. A tokenizer written in Python gains nothing from them.
"""

import copy
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from upfit.text.tokenizer import begin_token, encode_texts
from upfit.uptrain.data.shards import TOKEN_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 500_000  # sent to a process at once: the sending costs little beside the work
PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass
class Batch:
    """Some documents that follow each other, without the empty ones; `read` and `nbytes` count those too."""

    texts: list[str] = field(default_factory=list)
    characters: int = 0
    read: int = 0
    nbytes: int = 0


def batches(texts: Iterator[tuple[str, int]]) -> Iterator[Batch]:
    """Documents in batches of at least BATCH_CHARACTERS; `texts` yields each document and the bytes of input it took."""
    batch = Batch()
    for text, size in texts:
        batch.read, batch.nbytes = batch.read + 1, batch.nbytes + size
        if text.strip():
            batch.texts.append(text)
            batch.characters += len(text)
        if batch.characters >= BATCH_CHARACTERS:
            yield batch
            batch = Batch()
    yield batch


def tokenised(
    text_batches: Iterator[Batch], tokenizer: "PreTrainedTokenizerBase", dtype: str, workers: int
) -> Generator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Each batch in turn with the ids of its documents, one after the other, and their lengths.

    At most twice as many batches as `workers` are in memory.
    """
    own = threading.local()  # a tokenizer for each thread: they keep words they have seen, and would wait for each other

    def begin() -> None:
        own.tokenizer = copy.deepcopy(tokenizer)

    def encode(batch: Batch) -> tuple[Batch, np.ndarray, np.ndarray]:
        return batch, *token_ids(batch.texts, own.tokenizer, dtype)

    waiting: deque[Future[tuple[Batch, np.ndarray, np.ndarray]]] = deque()
    with one_core_a_call():
        pool = ThreadPoolExecutor(workers, initializer=begin)
        try:
            for batch in text_batches:
                waiting.append(pool.submit(encode, batch))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def token_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase", dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all `texts` one after the other, with begin and end tokens, and the number of tokens of each."""
    if not texts:
        return np.zeros(0, dtype=TOKEN_DTYPES[dtype]), np.zeros(0, dtype=np.int64)
    first, last = begin_token(tokenizer), tokenizer.eos_token_id  # once: each lookup takes 2 µs
    before = 0 if first is None else 1
    all_ids = encode_texts(tokenizer, texts, return_attention_mask=False)["input_ids"]
    lengths = np.array([before + len(ids) + 1 for ids in all_ids])
    joined = np.empty(lengths.sum(), dtype=TOKEN_DTYPES[dtype])
    at = 0
    for ids, length in zip(all_ids, lengths.tolist(), strict=True):
        if first is not None:
            joined[at] = first
        joined[at + before : at + length - 1] = ids
        joined[at + length - 1] = last
        at += length
    return joined, lengths


@contextmanager
def one_core_a_call() -> Iterator[None]:
    """Keep the tokenizers from starting threads of their own, as the environment tells them."""
    known = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if known is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = known
