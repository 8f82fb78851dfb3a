"""Examples for encoder-decoders where there is plain text alone."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.folders import letter_tokenizer
from tests.test_examples import SENTENCES, bart, letters, read, save_t5, text_file, tokenizer_with
from upfit.examples.from_text import masked, spread_pieces
from upfit.examples.targets import ends_with_language
from upfit.output import Output
from upfit.text import Document


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


def test_spans_of_plain_text_and_the_rest_of_it_are_the_text(
    t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = read(t5, text_file(tmp_path), output=Output())
    assert examples.kind == "spans" and examples.record["made"] == "spans" and len(examples.examples) == 3
    assert "spans of text are left out, as T5 was pretrained" in capsys.readouterr().err
    names = letter_tokenizer().get_vocab()
    for example in examples.examples:
        spans: dict[int, list[int]] = {}
        for token in example.labels[:-1].tolist():
            if token >= len(names):
                last = spans.setdefault(token, [])
            else:
                last.append(token)
        inputs = example.keywords["input_ids"][:-1].tolist()
        whole = [part for token in inputs for part in spans.get(token, [token])]
        assert letters(torch.tensor(whole)) == example.text == SENTENCES[0]


def test_bart_writes_the_text_that_is_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bart(tmp_path / "bart", tokenizer_with(mask_token="<mask>"), max_position_embeddings=512)
    examples = read(folder, text_file(tmp_path), output=Output())
    mask = letter_tokenizer().vocab_size
    assert (
        "spans of text are masked, as BART was pretrained" in capsys.readouterr().err and examples.record["made"] == "denoising"
    )
    for example in examples.examples:
        assert letters(example.labels) == SENTENCES[0]
        source = example.keywords["input_ids"]
        masks = int((source == mask).sum())
        assert 0.05 < masks / len(example.labels) < 0.15 and len(source) < 0.85 * len(example.labels)


def with_template(template: str) -> PreTrainedTokenizerFast:
    """Letters, and what a template puts around them: `$A` is the text, <begin> and <language> are no letters."""
    tokenizer = tokenizer_with("<begin>", "<language>", mask_token="<mask>")
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<begin>", "<end>", "<language>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=known)
    return tokenizer


def test_what_stands_around_every_text_is_never_masked_nor_cut_off(tmp_path: Path) -> None:
    tokenizer = with_template("<begin> $A <end>")
    begin, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<begin>", "<end>"))
    folder = bart(tmp_path / "bart", tokenizer, bos_token_id=begin, decoder_start_token_id=end)
    examples = read(folder, text_file(tmp_path)).examples
    assert len(examples) >= 3
    for example in examples:
        source, labels = example.keywords["input_ids"].tolist(), example.labels.tolist()
        assert len(source) <= 64 and len(labels) == 63, "what the model takes, one less for the end if it had none"
        for ids in (source, labels):
            assert ids[0] == begin and ids[-1] == end and ids.count(begin) == ids.count(end) == 1
        assert example.decoder_ids.tolist() == [end, *labels[:-1]] and example.text.startswith(letters(example.labels[1:-1]))


@pytest.mark.parametrize(
    ("template", "last"), [("$A", False), ("$A <end>", False), ("<begin> $A <end>", False), ("$A <end> <language>", True)]
)
def test_a_language_at_the_end_is_told_from_an_end(template: str, last: bool) -> None:
    assert ends_with_language(with_template(template)) is last


def test_pieces_are_of_as_many_documents_as_there_are() -> None:
    """Kinds in turn, and no document a second time before all of its kind were there; in the end every piece of all of them."""
    sizes = {"prose": (3, 1, 2, 2), "code": (2, 4)}
    documents = [
        Document(" ".join(f"{kind}{number}.{part}" + "-" * 40 for part in range(count)), f"{kind}{number}", kind)
        for kind, counts in sizes.items()
        for number, count in enumerate(counts)
    ]
    drawn = list(spread_pieces(documents, 60))
    names = [name for _, name in drawn]
    assert [name[:4] for name in names] == ["code", "pros"] * 6 + ["pros"] * 2
    for kind, counts in sizes.items():
        own = [name for name in names if name.startswith(kind)]
        order = own[: len(counts)]
        assert own == [name for turn in range(4) for name in order if counts[int(name[-1])] > turn]
    assert sorted(text.strip() for text, _ in drawn) == sorted(part for document in documents for part in document.text.split())


def test_masks_stand_for_whole_spans() -> None:
    import numpy as np

    ids = np.arange(10, 60)
    for seed in range(20):
        noisy = masked(ids, 1, np.random.default_rng(seed))
        left = noisy[noisy != 1]
        assert len(left) == 35 and (np.diff(left) > 0).all() and (noisy == 1).sum() == 5
        assert not ((noisy[1:] == 1) & (noisy[:-1] == 1)).any()


def test_pegasus_writes_the_sentences_that_are_left_out(tmp_path: Path) -> None:
    folder = bart(tmp_path / "gaps", tokenizer_with(AddedToken("<mask_1>")), max_position_embeddings=512)
    examples = read(folder, text_file(tmp_path))
    assert examples.record["made"] == "gaps"
    for example in examples.examples:
        source, gap = example.keywords["input_ids"], letter_tokenizer().vocab_size
        before, after = source[: source.tolist().index(gap)], source[source.tolist().index(gap) + 1 :]
        assert letters(before) + letters(example.labels) + letters(after) == SENTENCES[0]


def test_others_write_what_they_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bart(tmp_path / "copying", tokenizer_with(), max_position_embeddings=512)
    examples = read(folder, text_file(tmp_path), output=Output())
    assert examples.kind == "text pairs" and examples.record["made"] == "copying"
    assert all(letters(e.keywords["input_ids"]) == letters(e.labels) == SENTENCES[0] for e in examples.examples)
    assert "the decoder writes the text that was read; text like what the model will serve" in capsys.readouterr().err
