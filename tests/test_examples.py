"""What encoder-decoders of text are shown: pairs, and what stands in for them where there is plain text alone."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tests.folders import letter_tokenizer
from tests.tiny import tiny_model
from upfit.checkpoint.reader import read_config
from upfit.errors import UpfitError
from upfit.examples import Example, Examples, batches, kind_of, read_examples
from upfit.examples.choose import draw
from upfit.examples.pairs import fitted
from upfit.output import Output

SENTINELS = [AddedToken(f"<extra_id_{index}>") for index in range(20)]
SENTENCES = ["Plain words stand here. More of them follow, and then some. The end is near now. It is here."] * 3
PAIRS = [{"source": "one two " * (1 + index), "target": f"three {index}"} for index in range(5)]


def tokenizer_with(*tokens: Any, **special: Any) -> PreTrainedTokenizerFast:
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(list(tokens))
    if special:
        tokenizer.add_special_tokens(special)
    return tokenizer


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


def save_t5(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(vocab_size=130, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ids: dict[str, Any] = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    config = T5Config(**settings, **ids)
    return save(folder, T5ForConditionalGeneration(config), tokenizer_with(*SENTINELS))


def bart(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    settings: dict[str, Any] = dict(vocab_size=130, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=64)
    heads = {
        f"{part}_{name}": number
        for part in ("encoder", "decoder")
        for name, number in (("attention_heads", 2), ("ffn_dim", 16))
    }
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None)
    return save(folder, BartForConditionalGeneration(BartConfig(**{**settings, **heads, **ids, **changes})), tokenizer)


def read(folder: Path, *paths: Path, field: str = "text", count: int | None = None, output: Output | None = None) -> Examples:
    names = [str(path) for path in paths] or None
    return read_examples(folder, read_config(folder), names, "--calibration", field, count, output or Output(quiet=True))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    return write(path.with_suffix(".jsonl"), records)


def as_array(path: Path, records: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps(records))
    return path.with_suffix(".json")


def as_csv(path: Path, records: list[dict[str, Any]]) -> Path:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path.with_suffix(".csv")


def as_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def letters(ids: torch.Tensor) -> str:
    return "".join(letter_tokenizer().convert_ids_to_tokens([int(id) for id in ids if id > 2]))


def test_kinds_are_those_of_the_classes(t5: Path) -> None:
    kinds = {name: kind_of({"model_type": name}) for name in ("llama", "t5", "bart", "whisper", "moonshine")}
    assert kinds == {"llama": "text", "t5": "pairs", "bart": "pairs", "whisper": "sound", "moonshine": "sound"}
    assert (
        kind_of({"model_type": "upfit_gqa", "base_model_type": "whisper", "architectures": ["UpfitGqaForSeq2SeqLM"]}) == "sound"
    )
    assert kind_of(read_config(t5)) == "pairs"


@pytest.mark.parametrize("form", [as_lines, as_array, as_csv, as_parquet])
def test_pairs_are_read_alike_from_every_form(t5: Path, tmp_path: Path, form: Callable[..., Path]) -> None:
    read_ = read(t5, form(tmp_path / "pairs", PAIRS))
    assert read_.kind == "text pairs" and read_.record["fields"] == "source,target" and read_.record["count"] == 5
    assert [letters(example.keywords["input_ids"]) for example in read_.examples] == [pair["source"].strip() for pair in PAIRS]
    assert [(letters(example.labels), example.text) for example in read_.examples] == [
        (p["target"], p["target"]) for p in PAIRS
    ]
    again = read(t5, form(tmp_path / "pairs", PAIRS))
    assert again.record["sha256"] == read_.record["sha256"]


def test_the_decoder_reads_what_the_class_would(t5: Path, tmp_path: Path) -> None:
    """The loss of the labels is the class's own, which shifts them itself."""
    model: Any = T5ForConditionalGeneration.from_pretrained(t5).eval()
    for example in read(t5, write(tmp_path / "pairs.jsonl", PAIRS)).examples:
        shifted = model.prepare_decoder_input_ids_from_labels(labels=example.labels[None])[0]
        assert torch.equal(shifted, example.decoder_ids) and example.labels[-1] == 1


@pytest.mark.parametrize(
    ("record", "field", "expected"),
    [
        ({"input": "a", "output": "b"}, "text", ("a", "b")),
        ({"text": "a", "summary": "b", "id": "7"}, "text", ("a", "b")),
        ({"translation": {"de": "a", "en": "b"}}, "text", ("a", "b")),
        ({"translation": {"de": "a", "en": "b"}}, "en,de", ("b", "a")),
        ({"translation": {"de": "a", "en": "b", "fr": "c"}}, "fr,en", ("c", "b")),
        ({"question": "a", "answer": "b", "text": "c"}, "question, answer", ("a", "b")),
    ],
)
def test_fields_are_known_or_named(
    t5: Path, tmp_path: Path, record: dict[str, Any], field: str, expected: tuple[str, str]
) -> None:
    example = read(t5, write(tmp_path / "pairs.jsonl", [record]), field=field).examples[0]
    assert (letters(example.keywords["input_ids"]), letters(example.labels)) == expected


@pytest.mark.parametrize(
    ("records", "field", "message"),
    [
        (
            [{"translation": {"de": "a", "en": "b", "fr": "c"}}],
            "text",
            r"line 1 has several pairs of texts \(de, en, fr\); name one",
        ),
        (
            [{"document": "a", "text": "b", "summary": "c"}],
            "text",
            r"several pairs of texts \(text,summary or document,summary\)",
        ),
        (
            [{"question": "a", "answer": "b"}],
            "text",
            r"no pair of texts that is known by its names \(found: question, answer\)",
        ),
        ([{"source": "a", "target": "b"}, {"source": "a"}], "text", r"line 2 has no text in 'target' \(found: source\)"),
        ([{"source": "a", "target": 3}], "text", "line 1 has no text in 'target'"),
        ([{"source": "a", "target": " "}], "text", "holds no pair of texts in source,target"),
        ([], "text", "holds nothing"),
        ([["a", "b"]], "text", "line 1 is no JSON object but list"),
    ],
)
def test_what_is_no_pair_is_told_in_one_line(t5: Path, tmp_path: Path, records: list[Any], field: str, message: str) -> None:
    with pytest.raises(UpfitError, match=message) as error:
        read(t5, write(tmp_path / "pairs.jsonl", records), field=field)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_of_two_kinds(t5: Path, tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="nowhere.jsonl is not here"):
        read(t5, tmp_path / "nowhere.jsonl")
    texts, records = [tmp_path / f"text{n}.txt" for n in (1, 2)], [tmp_path / f"pairs{n}.jsonl" for n in (1, 2)]
    for text, pairs in zip(texts, records, strict=True):
        text.write_text("text")
        write(pairs, PAIRS)
    with pytest.raises(UpfitError, match=r"has records \(\S*/pairs1.jsonl\) and text \(\S*/text1.txt\)"):
        read(t5, *records, *texts)
    with pytest.raises(UpfitError, match="--field a,b is for files of records"):
        read(t5, texts[0], field="a,b")


def test_empty_texts_are_left_out_and_counted(t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "pairs.jsonl", [*PAIRS, {"source": "a", "target": None}, {"source": "", "target": "b"}])
    assert len(read(t5, path, output=Output()).examples) == 5
    assert "left out: 2 pairs" in capsys.readouterr().err


def test_what_is_longer_than_the_model_is_cut_and_keeps_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bart(tmp_path / "bart", tokenizer_with())
    path = write(tmp_path / "pairs.jsonl", [{"source": "a" * 90, "target": "b" * 90}])
    example = read(folder, path, output=Output()).examples[0]
    assert (len(example.keywords["input_ids"]), len(example.decoder_ids), len(example.labels)) == (64, 64, 64)
    assert fitted([3, 4, 5, 6, 1], 4) == [3, 4, 5, 1] and fitted([3, 4, 1], 4) == [3, 4, 1]
    assert "cut short: 1 of 1 pairs have more than 64 tokens to read, or 64 to write" in capsys.readouterr().err


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    return write(path, [{"text": sentence} for sentence in SENTENCES])


def nllb(folder: Path) -> tuple[Path, Any]:
    """A model that translates, its tokenizer made for three letters and all of NLLB's languages."""
    from transformers import NllbTokenizer

    words = ("<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "c")
    tokenizer: Any = NllbTokenizer(vocab={word: id for id, word in enumerate(words)}, merges=[], src_lang="eng_Latn")
    ids = dict(vocab_size=300, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    return bart(folder, tokenizer, **ids), tokenizer


def test_a_translation_is_in_the_languages_that_its_fields_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tokenizer = nllb(tmp_path / "nllb")
    english, french = tokenizer.convert_tokens_to_ids(["eng_Latn", "fra_Latn"])
    path = write(tmp_path / "pairs.jsonl", [{"translation": {"eng_Latn": "ab", "fra_Latn": "c"}}])
    for field, first, second in (("text", english, french), ("fra_Latn,eng_Latn", french, english)):
        example = read(folder, path, field=field, output=Output()).examples[0]
        assert example.keywords["input_ids"][0] == first and example.labels[0] == second and example.labels[-1] == 2
        assert example.decoder_ids[:2].tolist() == [2, second]
    assert "eng_Latn is read, fra_Latn is written; --field fra_Latn,eng_Latn turns it" in capsys.readouterr().err
    unknown = read(folder, write(tmp_path / "pairs.jsonl", [{"source": "ab", "target": "c"}]), output=Output()).examples[0]
    assert unknown.labels[0] == english and "both texts are taken to be eng_Latn" in capsys.readouterr().err
    text = write(tmp_path / "text.jsonl", [{"text": "abc" * 10}])
    assert read(folder, text).record["made"] == "copying"


def test_a_language_at_the_end_of_a_text_is_what_the_decoder_begins_with(tmp_path: Path) -> None:
    """As mBART's own shifting has it."""
    from transformers import MBartTokenizer
    from transformers.models.mbart.modeling_mbart import shift_tokens_right

    words = ("<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "c")
    vocabulary = [(word, -float(id)) for id, word in enumerate(words)]
    tokenizer: Any = MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="ro_RO")
    ids: dict[str, Any] = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=None)
    folder = tmp_path / "mbart"
    save(folder, tiny_model("mbart", vocab_size=60, max_position_embeddings=64, **ids), tokenizer)
    example = read(folder, write(tmp_path / "pairs.jsonl", [{"en_XX": "ab", "ro_RO": "c"}]), field="en_XX,ro_RO").examples[0]
    english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
    assert example.labels[-2:].tolist() == [2, romanian] and example.keywords["input_ids"][-1] == english
    assert torch.equal(shift_tokens_right(example.labels[None], 1)[0], example.decoder_ids)


@pytest.mark.slow
def test_without_files_the_standard_library_is_read(t5: Path) -> None:
    examples = read(t5, count=6)
    assert len(examples.examples) == 6 and len({example.document for example in examples.examples}) == 6
    assert examples.record["files"] == "the standard library of Python"
    assert read(t5, count=6).record["sha256"] == examples.record["sha256"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = bart(tmp_path / "small", tokenizer_with(), vocab_size=40)
    with pytest.raises(UpfitError, match="the model knows 40: it belongs to another model"):
        read(folder, text_file(tmp_path))


def test_a_draw_is_even_and_always_the_same() -> None:
    counts = torch.zeros(10)
    for seed in range(1000):
        chosen, number = draw((f"{seed}.{index}" for index in range(10)), 3)
        assert number == 10 and chosen == sorted(chosen)
        counts[[int(item.split(".")[1]) for item in chosen]] += 1
    assert draw(range(10), 3) == draw(range(10), 3)
    assert draw(range(2), 3) == ([0, 1], 2)
    spread = torch.zeros(200)
    spread[draw(range(200), 100)[0]] = 1
    assert 35 < spread[:100].sum() < 65


def test_every_example_is_in_one_batch_and_padding_is_told(t5: Path, tmp_path: Path) -> None:
    examples = read(t5, write(tmp_path / "pairs.jsonl", PAIRS)).examples
    made = batches(examples, read_config(t5), 120)
    assert sum(len(batch.keywords["input_ids"]) for batch in made) == 5 and len(made) > 1
    assert all(batch.keywords["input_ids"].numel() + batch.keywords["decoder_input_ids"].numel() <= 120 for batch in made)
    for batch in made:
        assert batch.counted is not None and batch.labels is not None
        assert torch.equal(batch.counted, batch.labels != -100)
        assert (batch.keywords["decoder_input_ids"][~batch.counted] == 0).all()
    lengths = [batch.keywords["input_ids"].shape[1] for batch in made]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_changes_nothing(t5: Path, tmp_path: Path, family: str) -> None:
    folder = t5 if family == "t5" else bart(tmp_path / "bart", tokenizer_with())
    model_class: Any = T5ForConditionalGeneration if family == "t5" else BartForConditionalGeneration
    model = model_class.from_pretrained(folder).eval()
    examples = read(folder, write(tmp_path / "pairs.jsonl", PAIRS)).examples
    config = read_config(folder)

    def logits(examples: list[Example]) -> torch.Tensor:
        batch = batches(examples, config, 10_000)[0]
        with torch.no_grad():
            return model(**batch.keywords).logits[batch.counted]

    alone = torch.cat([logits([example]) for example in examples])
    torch.testing.assert_close(logits(examples), alone, atol=1e-5, rtol=1e-5)
