"""The needle: where it stands, what is measured of it, and that a model which finds it is told apart from one that does not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.folders import letter_tokenizer, tiny_llama
from tests.records import evaluate
from upfit.calibration.observe import Seen
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.options import Options
from upfit.evaluate.probes import needle
from upfit.evaluate.probes.needle import DEPTHS, Sample, compared, largest_logit, make_samples, mass, probe, summary
from upfit.output import Output
from upfit.text import python_documents


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model())


def test_samples_hold_what_they_say(tokenizer: Any) -> None:
    samples = make_samples(python_documents(), tokenizer, 10, 256)
    assert [sample.depth for sample in samples] == list(DEPTHS) * 2
    for sample in samples:
        assert len(sample.ids) == 256
        answer = sample.ids[-sample.answer :]
        assert np.array_equal(answer, sample.ids[sample.needle[0] : sample.needle[1]])
        assert tokenizer.decode(answer).strip().isdecimal()
        said = tokenizer.decode(sample.ids[: -sample.answer])
        name = said.rsplit("The code of ", 1)[1].removesuffix(" is")
        assert f"The code of {name} is {tokenizer.decode(answer).strip()}." in said
    first, last = samples[0].needle[0], samples[4].needle[0]
    assert first < 20 and last > 200
    again = make_samples(python_documents(), tokenizer, 10, 256)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(samples, again, strict=True))


def test_what_does_not_fit_is_told(tokenizer: Any) -> None:
    with pytest.raises(UpfitError, match="--probe-length 20"):
        make_samples(python_documents(), tokenizer, 1, 20)


def test_mass_is_where_the_attention_is() -> None:
    """A head that looks at the answer alone, one that looks at the first token, and what a difference of maps makes of them."""
    tokens, needle = 12, (4, 6)
    k = torch.zeros(1, 2, tokens, 2)
    k[0, 0, 4:6, 0] = k[0, 1, 0, 1] = 50.0
    q = torch.ones(1, 2, tokens, 2)
    sample = Sample(np.arange(tokens), needle, 2, 0.5)
    assert sample.asks == 9
    seen = Seen(nn.Identity(), q, k, torch.zeros_like(k), None, 1.0, None, None, q)
    assert mass(seen, sample).numpy() == pytest.approx(np.array([[1, 0, 0], [0, 1, 0]]), abs=1e-6)
    assert largest_logit(seen) == 50.0

    class Difference(nn.Module):
        def combine_maps(self, maps: torch.Tensor, row: int) -> torch.Tensor:
            assert row == 9
            return maps[:, :1] - 0.5 * maps[:, 1:]

    told = mass(Seen(Difference(), q, k, torch.zeros_like(k), None, 1.0, None, None, q), sample)
    assert told.numpy() == pytest.approx(np.array([[1 / 1.5, 0.5 / 1.5, 0.0]]), abs=1e-6)


def test_the_largest_logit_is_that_of_any_query_and_key_it_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 0 too, in any head, in rows taken at a time; keys after the query do not count."""
    monkeypatch.setattr(needle, "ROWS_AT_ONCE", 5)
    q, k = torch.zeros(1, 2, 12, 2), torch.zeros(1, 1, 12, 2)
    q[0, 1, 11, 0], k[0, 0, 9, 0] = -3.0, 2.0
    q[0, 0, 2, 1], k[0, 0, 3, 1] = 100.0, 1.0
    assert largest_logit(Seen(nn.Identity(), q, k, torch.zeros_like(k), None, 0.5, None, None, q)) == 3.0


class Copier(nn.Module):
    """Says the tokens of the needle where they are asked for; with `wrong` something else."""

    def __init__(self, samples: list[Sample], wrong: int) -> None:
        super().__init__()
        self.samples, self.wrong, self.at = samples, wrong, 0
        self.config, self.device = type("Config", (), {"_attn_implementation": "sdpa"})(), torch.device("cpu")

    def set_attn_implementation(self, name: str) -> None: ...

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(1, input_ids.shape[1], 4096)
        shifted = input_ids.roll(-1, 1) + (self.wrong if self.at % 2 else 0)
        logits.scatter_(2, shifted[..., None], 30.0)
        self.at += 1
        return type("Told", (), {"logits": logits, "hidden_states": (torch.full((1,), 7.0),)})()


def test_who_finds_it_is_told_apart(tokenizer: Any) -> None:
    samples = make_samples(python_documents(), tokenizer, 10, 128)
    with Output(quiet=True).progress("", 20) as meter:
        good, half = probe(Copier(samples, 0), samples, meter), probe(Copier(samples, 1), samples, meter)
    told, other = summary(good, samples).record(), summary(half, samples).record()
    assert told["accuracy"]["mean"] == 1.0 and other["accuracy"]["mean"] == 0.5
    assert told["largest_hidden"] == 7.0 and told["largest_logit"] is None
    difference = compared(good, half)["accuracy"]
    assert difference["mean"] == 0.5 and difference["low"] > 0


def test_heads_and_their_mean_are_of_the_same_attention() -> None:
    """The mass on the answer, not that on the first token or the rest, of each head; over heads and layers it is the mean."""
    model, letters = tiny_llama().eval(), letter_tokenizer()
    samples = make_samples(python_documents()[:9], letters, 2, 128)
    with Output(quiet=True).progress("", 2) as meter:
        watched = probe(model, samples, meter)
    assert len(watched.heads) == 2 and {len(layer) for layer in watched.heads[0]} == {model.config.num_attention_heads}
    assert np.mean(watched.heads, (1, 2)) == pytest.approx(np.array(watched.mass)[:, 0], abs=1e-6)
    assert np.array(watched.mass)[:, 0] != pytest.approx(np.array(watched.mass)[:, 2], abs=1e-2)


@pytest.mark.slow
def test_the_verb_tells_it() -> None:
    options = Options(
        against=str(embedded_model()), windows=2, probe=["needle"], probe_samples=5, probe_length=[128], length=64
    )
    told = evaluate(str(embedded_model()), options, Output(quiet=True))
    needle = told["model"]["probes"]["needle"]
    shares = [needle[f"attention_on_{name}"]["mean"] for name in ("answer", "first_token", "rest")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5) and needle["largest_logit"] > 0
    assert told["probe_differences"]["needle"]["accuracy"]["mean"] == 0.0
    with pytest.raises(UpfitError, match="--probe got 'hay'"):
        evaluate(str(embedded_model()), Options(probe=["hay"]), Output(quiet=True))
