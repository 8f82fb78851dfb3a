"""Settings of the test run that must stand before torch is imported."""

import gc
import logging
import os

import pytest

# Two workers share two cores: more threads would only spin against each other. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels run in Triton's interpreter, on any machine.
os.environ.setdefault("TRITON_INTERPRET", "1")


class NothingDeprecated(logging.Handler):
    """transformers logs some of its deprecations instead of warning: whoever calls by an old name has a test fail."""

    def emit(self, record: logging.LogRecord) -> None:
        assert "deprecated" not in (message := record.getMessage()), message


logging.getLogger("transformers").addHandler(NothingDeprecated())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that at the end no worker waits for the other's long test."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage, and looking through it takes 0.3 s, each time that a model is let go."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at the end of what they find held
