"""Every class that can be converted runs on inputs made for it, so every result is compared with its source."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import BUILDABLE, runs, tiny_model
from tests.tiny_data import INPUTS
from upfit.convert import verify
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Verification
from upfit.errors import UpfitError
from upfit.examples.random_inputs import decoder_ids, in_streams, possible_inputs
from upfit.output import Output

TAKES_MORE = sorted(set(INPUTS) & set(BUILDABLE))
IDS = torch.arange(3, 27)[None]


def ran(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    answer = verify._first_that_runs(model, list(possible_inputs(model, ids)))
    assert not isinstance(answer, str), answer
    return answer.keywords, answer.logits


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[] if t in TAKES_MORE else pytest.mark.slow) for t in BUILDABLE])
def test_every_class_runs_on_inputs_made_for_it(model_type: str) -> None:
    """And what it gives depends on all that it is given: no attention is left out."""
    if not runs(model_type):
        pytest.skip("its own forward does not run in the installed transformers")
    model = tiny_model(model_type)
    keywords, logits = ran(model, IDS)
    assert logits.isfinite().all() and logits.shape[0] == IDS.shape[1]
    assert set(keywords) == set(INPUTS.get(model_type, {"input_ids": ()}))
    again, same = ran(model, IDS)
    assert torch.equal(logits, same) and all(torch.equal(value, again[name]) for name, value in keywords.items())
    for name, value in keywords.items() if model_type in TAKES_MORE else ():
        other = value.flip(1) if value.is_floating_point() else value.flip(1).contiguous()
        with torch.no_grad():
            changed = model(**{**keywords, name: other}, use_cache=False).logits[0]
        assert not torch.allclose(logits, changed, atol=1e-6), name


@pytest.mark.parametrize("known", [1, 2, 30])
def test_tokens_that_are_made_are_tokens_that_the_model_knows(known: int) -> None:
    """In every stream of sound that is read, and in every channel that is written; among 900 drawn from 2, both."""
    ids, draw = torch.arange(300)[None] % 30, torch.Generator().manual_seed(0)
    streams = in_streams(SimpleNamespace(num_codebooks=3, codebook_vocab_size=known), ids, draw)
    assert streams.shape == (1, 300, 4) and torch.equal(streams[..., 0], ids)
    decoder = SimpleNamespace(num_channels=3, vocab_size=known)
    channels = decoder_ids(SimpleNamespace(delay_pattern=[0], get_text_config=lambda **_: decoder), ids, draw)
    assert channels.shape == (1, 300, 3)
    for tokens in (streams[..., 1:], channels):
        assert tokens.unique().tolist() == list(range(known))


@pytest.mark.parametrize("config", [{}, {"num_codebooks": 3}, {"codebook_vocab_size": 9}, {"num_codebooks": None}])
def test_tokens_of_sound_are_made_where_their_number_and_their_kinds_are_known(config: dict[str, Any]) -> None:
    ids = torch.arange(9)[None]
    assert in_streams(SimpleNamespace(**config), ids, torch.Generator()) is ids


@pytest.mark.parametrize("model_type", ["whisper", "speech_to_text", "canary", "dia", "voxtral_realtime", "mllama"])
def test_what_takes_more_than_text_is_compared(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "source")
    recipe = get_recipe("gqa")
    for kv_heads, equal in ((4, True), (2, False)):
        options = recipe.options(kv_heads=kv_heads, method="mean")
        answer = convert(recipe, str(tmp_path / "source"), tmp_path / f"{kv_heads}", options, Settings(), Output(quiet=True))
        assert isinstance(answer.verify, Verification) and answer.verify.equal is equal and answer.verify.loss is None
        assert answer.verify.numbers.startswith("logits")


def test_a_result_that_does_not_run_where_its_source_does_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_model("whisper").save_pretrained(folder)
    original, calls = verify._first_that_runs, list[int]()

    def second_fails(model: Any, candidates: Any) -> Any:
        calls.append(len(candidates))
        return original(model, candidates) if len(calls) == 1 else "ValueError: no"

    monkeypatch.setattr(verify, "_first_that_runs", second_fails)
    with pytest.raises(UpfitError, match=r"does not run where the source's does \(ValueError: no\)"):
        verify.verify(folder, folder, verify.Promise(0.0), folder)
    assert calls == [2, 1]


def test_a_class_that_does_not_run_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_model("whisper").save_pretrained(folder)
    monkeypatch.setattr(verify, "possible_inputs", lambda model, ids: [{"input_ids": ids}])
    numbers = verify.verify(folder, folder, verify.Promise(0.0), folder).numbers
    assert numbers.startswith("not compared: the source's own class does not run here (")
