"""Encoder-decoders: what span corruption leaves out is what the decoder is to write, and training wins back what was lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import T5Config, T5ForConditionalGeneration

from tests.folders import letter_tokenizer
from tests.test_uptrain_resume import Interrupting
from tests.uptraining import QUIET, Workshop, metrics, text, weights
from upfit import provenance
from upfit.errors import UpfitError
from upfit.text.spans import Vocabulary, corrupt, cut, sizes_of
from upfit.uptrain.data.prepare import prepare
from upfit.uptrain.data.spans import find_vocabulary, fitting
from upfit.uptrain.model.losses import Objective
from upfit.uptrain.model.model_traits import ModelTraits, load
from upfit.uptrain.model.seq2seq import Seq2Seq

SENTINELS = 20
VOCABULARY = Vocabulary(tuple(range(100, 100 + SENTINELS)), 1)


def test_inputs_and_labels_together_are_the_text() -> None:
    sizes, tokens = sizes_of(40), np.arange(2, 42)
    for seed in range(50):
        inputs, labels = corrupt(tokens, sizes, VOCABULARY, np.random.default_rng(seed))
        assert (len(inputs), len(labels)) == (sizes.input, sizes.labels) and inputs[-1] == labels[-1] == 1
        spans = np.split(labels[:-1], np.flatnonzero(labels[:-1] >= 100)[1:])
        assert [span[0] for span in spans] == list(VOCABULARY.sentinels[: sizes.spans])
        whole = [part for token in inputs[:-1] for part in (spans[token - 100][1:] if token >= 100 else [token])]
        assert whole == list(tokens)


def test_a_share_is_left_out_and_every_cut_is_as_likely() -> None:
    sizes = fitting(512)
    assert sizes.input == 512 and sizes.noise / sizes.text == pytest.approx(0.15, abs=0.002)
    assert sizes.noise / sizes.spans == pytest.approx(3.0, abs=0.05) and (sizes.text, sizes.labels) == (568, 114)  # as T5's own
    random = np.random.default_rng(0)
    counts = np.unique([cut(4, 2, random) for _ in range(3000)], axis=0, return_counts=True)
    assert counts[0].tolist() == [[1, 3], [2, 2], [3, 1]] and all(abs(count - 1000) < 120 for count in counts[1])


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(UpfitError, match="--length 2"):
        fitting(2)
    with pytest.raises(UpfitError, match="extra_id_0"):
        find_vocabulary(letter_tokenizer())


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    config = T5Config(**settings, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny T5 and one whose decoder's keys were disturbed, with the other as teacher."""
    folder = tmp_path_factory.mktemp("shop")
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<extra_id_{index}>") for index in range(SENTINELS)])
    student = tiny_t5()
    student.save_pretrained(folder / "teacher")
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name.endswith("EncDecAttention.v.weight"):
                weight.mul_(0.3)
    student.save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    source = {"name": "teacher", "revision": None, "path": str(folder / "teacher")}
    provenance.write(folder / "student", [provenance.step("convert gqa", source, {})])
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text(seed)}) for seed in range(60)))
    prepare([str(folder / "text.jsonl")], folder / "data", str(folder / "teacher"), "text", QUIET)
    return Workshop(folder / "teacher", folder / "student", folder / "data")


def test_the_loss_is_the_classs_own(shop: Workshop) -> None:
    model = load(shop.teacher, torch.float32, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(3, 90, (2, 20), generator=random), torch.randint(3, 90, (2, 7), generator=random)
    labels[1, 5:] = -100
    traits = ModelTraits(False, False, None)
    learner = Seq2Seq(model, traits, Seq2Seq(model, traits, None, {"": Objective(1.0, 0.0)}), {"": Objective(1.0, 1.0)})
    loss, ce, kl = learner(ids, labels, labels)
    torch.testing.assert_close(ce / (labels != -100).sum(), model(input_ids=ids, labels=labels).loss.detach())
    torch.testing.assert_close(kl, torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.detach(), ce)


@pytest.mark.slow
def test_training_wins_back_what_was_lost_and_resumes_exactly(shop: Workshop, tmp_path: Path) -> None:
    report = shop.run(tmp_path / "whole", tokens="3k")
    before, after = report.holdout["before"], report.holdout["after"]
    assert after["kl"] < 0.7 * before["kl"] and before["teacher_ce"] > 0
    sizes = fitting(32)
    steps = report.steps
    assert report.tokens == steps * (128 // sizes.text) * sizes.text
    shop.run(tmp_path / "broken", output=Interrupting(5), tokens="3k")
    shop.run(tmp_path / "broken", resume=True, tokens="3k")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    loaded: Any = T5ForConditionalGeneration.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(loaded[1].values())


@pytest.mark.slow
def test_it_learns_without_a_teacher(shop: Workshop, tmp_path: Path) -> None:
    shop.run(tmp_path / "out", stages="lm", tokens="1k")
    losses = [line["ce"] for line in metrics(tmp_path / "out")]
    assert losses[-1] < losses[0]


def test_what_decoders_alone_can_have_is_refused(shop: Workshop, tmp_path: Path) -> None:
    for changes in ({"stages": "layerwise"}, {"chunk": 64}, {"document_mask": False}):
        with pytest.raises(UpfitError, match="encoder-decoder"):
            shop.run(tmp_path / "out", **changes)
