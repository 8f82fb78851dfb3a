"""What the comparison of engines counts, and the line that it tells where one does not run."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import beside, run

REFERENCE = {"rows": [{"prompt": [-1.0, -2.0], "tokens": [5, 6, 7], "logprobs": [-0.5, -0.25, -0.125]}]}


def answers(tokens: list[int], logprobs: list[float], prompt: list[float]) -> dict[str, Any]:
    rows = [{"prompt": prompt, "tokens": tokens, "logprobs": logprobs}]
    return {"version": "1", "cache_bytes_a_token": 8.0, "rows": rows}


def test_what_follows_another_token_is_not_compared() -> None:
    row = beside(answers([5, 9, 7], [-0.5, -9.0, -9.0], [-1.0, -2.25]), REFERENCE)
    assert (row["tokens_equal"], row["tokens"], row["max_logprob_difference"]) == (1, 3, 0.25)
    row = beside(answers([5, 6, 7], [-0.5, -0.25, -0.625], [-1.0, -2.25]), REFERENCE)
    assert (row["tokens_equal"], row["max_logprob_difference"], row["mean_logprob_difference"]) == (3, 0.5, 0.15)


def test_an_engine_that_answers_fewer_tokens_is_no_match() -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        beside(answers([5, 6], [-0.5, -0.25], [-1.0, -2.0]), REFERENCE)


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("[rank0]: ValueError: Head dimension 128 is not supported", "ValueError: Head dimension 128 is not supported"),
        ("/home/me/src/x.cpp:1: GGML_ASSERT(a < b) failed\\nValueError: no model", "x.cpp:1: GGML_ASSERT(a < b) failed"),
        ("an error\\nanother error\\nbye", "another error"),
        ("killed", "killed"),
    ],
)
def test_the_engines_own_line(tmp_path: Path, written: str, line: str) -> None:
    code = f"import sys; print('{written}'); sys.exit(1)"
    assert run([sys.executable, "-c", code], tmp_path / "log") == {"error": line}
    assert run([sys.executable, "-c", "print('error')"], tmp_path / "log") is None
