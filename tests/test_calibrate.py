"""`upfit calibrate` and what conversions make of it: one statistics file, reused, resumed, refused where it does not belong."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.folders import save_tiny
from upfit import provenance
from upfit.architecture.layers import bind
from upfit.calibration import calibrate as room
from upfit.calibration import sample
from upfit.calibration.calibrate import calibrate
from upfit.calibration.gather import gather_layer
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.observe import Seen, _added
from upfit.calibration.result import Calibration
from upfit.calibration.statistics import Rows, add, observe
from upfit.calibration.teacher_student import PairedBatch
from upfit.calibration.traits import AttentionTraits, Layout, _scales_agree, probe_attention
from upfit.calibration.watch import Place, Watched, _without_copies, watch
from upfit.checkpoint.reader import open_checkpoint
from upfit.cli import app
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.examples.model_inputs import ModelInputs
from upfit.output import Output
from upfit.provenance import method_ran
from upfit.publish.card import Card
from upfit.report.story import gather
from upfit.text import Document

QUIET = Output(quiet=True)
TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return save_tiny(tmp_path / "model")


def run(
    model: Path, name: str = "stats.safetensors", tokens: str = "1k", length: int = 64, overwrite: bool = False
) -> Calibration:
    text = [str(model.parent / "text.txt")]
    return calibrate(str(model), text, model.parent / name, tokens, length, None, overwrite, QUIET)


def converted(model: Path, name: str, **options: Any) -> Path:
    recipe = get_recipe("gqa")
    convert(recipe, str(model), model.parent / name, recipe.options(**options), Settings(verify=False), QUIET)
    return model.parent / name


def test_reused_statistics_give_the_same_bytes(model: Path) -> None:
    """Converting with text equals calibrating first and converting with the file, for every number of heads."""
    run(model)
    for kv_heads in (1, 2):
        text: dict[str, Any] = dict(
            kv_heads=kv_heads,
            calibration=[str(model.parent / "text.txt")],
            calibration_tokens="1k",
            calibration_length=64,
        )
        at_once = converted(model, f"text-{kv_heads}", **text)
        reused = converted(model, f"stats-{kv_heads}", kv_heads=kv_heads, calibration=[str(model.parent / "stats.safetensors")])
        assert (at_once / "model.safetensors").read_bytes() == (reused / "model.safetensors").read_bytes()
        recorded = json.loads((reused / "recipe.json").read_text())["steps"][-1]["measurements"]
        assert recorded["calibration"]["tokens"] == 960 and len(recorded["layers"]) == 2
        assert recorded["head_order"] == [sum(layer["groups"], []) for layer in recorded["layers"]]  # a query head a key head


def test_pieces_add_up(model: Path) -> None:
    """The sums of a window watched in two pieces of its rows equal those of one piece."""
    with open_checkpoint(model) as checkpoint:
        architecture = bind(checkpoint.config, checkpoint.tensors)
        stream = LayerwiseModel(checkpoint, architecture, [ModelInputs({"input_ids": torch.arange(96).reshape(2, 48) % 100})])
        stream.load(0)
        block, batch = stream.blocks[0], stream.batches[0]
        assert batch.hidden is not None
        place = Place(block, block.attentions[0], architecture.entry, architecture.layers[0].geometry)
        traits, _ = probe_attention(place, batch.hidden, batch.calls[0])
        seen = watch(place, batch.hidden, batch.calls[0], ()).seen
    rows = torch.arange(0, 48, 3)
    whole = observe(seen, traits, [Rows(rows, 48)])
    pieces: dict[str, torch.Tensor] = {}
    for some in rows.split(7):
        add(pieces, observe(seen, traits, [Rows(some, int(some[-1]) + 1)]))
    assert whole.keys() == pieces.keys() == {"rows", "keys", "key_pairs", "queries", "values"}
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()))


def test_padding_counts_for_nothing() -> None:
    """The sums of two texts of which one is shorter, over rows that are no padding, are those of both by themselves."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, generator=generator).double() for _ in range(3))
    traits = AttentionTraits(True, True, False, True, True, 1, (0, 1, 2, 3), (1.0,), None)
    rows, counted = torch.tensor([1, 3, 5]), torch.tensor([[True] * 6, [True, True, True, True, False, False]])

    def sums(texts: slice, sampled: Rows) -> dict[str, torch.Tensor]:
        return observe(Seen(torch.nn.Identity(), q[texts], k[texts], v[texts], None, 0.5, None, None, v), traits, [sampled])

    together = sums(slice(0, 2), Rows(rows, 6, counted[:, rows].double()))
    apart = sums(slice(0, 1), Rows(rows, 6))
    add(apart, sums(slice(1, 2), Rows(rows[:2], 4)))
    for name in ("keys", "key_pairs", "queries", "values"):
        torch.testing.assert_close(together[name], apart[name])
    batch = PairedBatch(False, [], [], q[:, 0], q[:, 0], 6, counted)
    weights = batch.weights(q[:, 0], 2.0)
    assert torch.equal(weights != 0, counted)


def test_a_bias_by_position_hides_what_a_mask_hides() -> None:
    bias = torch.arange(9.0).reshape(1, 1, 3, 3)
    future = torch.ones(3, 3).triu(1).bool()
    assert torch.equal(_added(bias, None, True, 3), bias.masked_fill(future, float("-inf")))
    assert torch.equal(_added(bias, None, False, 3), bias)
    assert torch.equal(_added(bias, ~future[None, None], True, 3), bias.masked_fill(future, float("-inf")))
    assert torch.equal(_added(bias, torch.full((1, 1, 3, 3), 2.0), True, 3), bias + 2)


def test_copies_of_keys_and_values_are_seen_as_one_of_each() -> None:
    """As projections give them: of two for four query heads, the first of each two; what is no copy stays."""
    place: Any = SimpleNamespace(shape=SimpleNamespace(kv_heads=2), path=lambda part: f"attention.{part}")
    ones, query = torch.randn(1, 2, 5, 3), torch.randn(1, 4, 5, 3)
    copies = ones.repeat_interleave(2, 1)
    flat = {name: x.transpose(1, 2).flatten(2) for name, x in (("q", query), ("k", copies), ("v", copies))}
    taps = {f"attention.{name}": (torch.randn(1, 5, 7), output) for name, output in flat.items()}
    taps["other"] = taps["attention.k"]
    seen = Seen(torch.nn.Identity(), query, copies, copies, None, 1.0, None, None, query)
    watched = _without_copies(Watched(seen, taps, query, query), place)
    assert torch.equal(watched.seen.k, ones) and torch.equal(watched.seen.v, ones) and watched.seen.q is query
    for name in ("k", "v"):
        inputs, output = watched.taps[f"attention.{name}"]
        assert inputs is taps[f"attention.{name}"][0] and torch.equal(output, ones.transpose(1, 2).flatten(2))
    assert watched.taps["attention.q"] is taps["attention.q"] and watched.taps["other"] is taps["other"]
    for keys in (query, ones, torch.cat([copies, ones[:, :1]], 1)):
        plain = Watched(replace(seen, k=keys), taps, query, query)
        assert _without_copies(plain, place) is plain


@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
@pytest.mark.parametrize(("apart", "agree"), [(0.0, True), (1e-6, True), (1e-3, False), (0.5, False)])
def test_scales_agree_where_both_dimensions_of_every_pair_have_one(part: str, apart: float, agree: bool) -> None:
    """A turn goes through such a norm; whatever the scales of other pairs, and however small they all are."""
    for size in (1.0, 1e-4):
        attention, scale = torch.nn.Module(), torch.tensor([1.0, 3.0, -2.0, 1.0, 3.0, -2.0]) * size
        scale[4] *= 1 + apart
        for name in ("q_norm", "k_norm"):
            attention.add_module(name, torch.nn.RMSNorm(6))
        attention.get_submodule(part).weight = torch.nn.Parameter(scale)
        names = {"q_norm": "q_norm", "k_norm": "k_norm"}
        assert _scales_agree(attention, names, Layout(3, tuple(range(6)), ())) == agree
        assert not _scales_agree(attention, names, Layout(2, tuple(range(6)), ())), "a dimension that is not turned"


def test_sums_are_those_of_the_definition() -> None:
    """Keys under the attention less their mean for each query, queries, values as each head mixes them: in plain loops."""
    heads, kv_heads, tokens, width = 4, 2, 6, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, width, generator=generator).double() for n in (heads, kv_heads, kv_heads))
    order, pairs = (1, 0, 3, 2, 4), 2  # pairs of dimensions (1, 3) and (0, 2), and 4 that is not turned
    traits = AttentionTraits(True, True, False, True, True, pairs, order, (1.0, 0.1), None)
    seen = Seen(torch.nn.Identity(), q, k, v, None, 0.4, None, None, v)
    rows = torch.tensor([2, 5])
    found = observe(seen, traits, [Rows(rows, tokens)])
    keys = torch.zeros(kv_heads * width, kv_heads * width).double()
    values, queries = torch.zeros_like(keys), torch.zeros(heads, width, width).double()
    turned = torch.zeros(heads, pairs, kv_heads, kv_heads, dtype=torch.complex128)
    joint = k[0][..., list(order)].transpose(0, 1).flatten(1)  # [tokens, K·D]
    plain = v[0].transpose(0, 1).flatten(1)
    for h in range(heads):
        for row in rows.tolist():
            scores = 0.4 * k[0, h // 2, : row + 1] @ q[0, h, row]
            p = scores.softmax(0)
            mean = p @ joint[: row + 1]
            mixed = p @ plain[: row + 1]
            values += torch.outer(mixed, mixed)
            asked = q[0, h, row, list(order)]
            queries[h] += torch.outer(asked, asked)
            for weight, key in zip(p, joint, strict=False):
                gap = key - mean
                keys += weight * torch.outer(gap, gap)
                parts = gap.unflatten(0, (kv_heads, width))
                for pair in range(pairs):
                    z = torch.complex(parts[:, pair], parts[:, pairs + pair])
                    turned[h, pair] += weight * torch.outer(z, z.conj())
    for name, wanted in (("keys", keys), ("values", values), ("queries", queries)):
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.view_as_complex(found["key_pairs"]), turned, rtol=1e-6, atol=1e-6)


def test_killed_is_resumed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first layer, the same command goes on with the second, and the file is what it would have been."""
    run(model, "unbroken.safetensors")
    seen: list[int] = []

    def failing(*arguments: Any) -> Any:
        seen.append(arguments[2])
        if arguments[2] == 1:
            raise KeyboardInterrupt
        return gather_layer(*arguments)

    monkeypatch.setattr(room, "gather_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert not (model.parent / "stats.safetensors").exists()

    def counting(*arguments: Any) -> Any:
        seen.append(arguments[2])
        return gather_layer(*arguments)

    monkeypatch.setattr(room, "gather_layer", counting)
    run(model)
    assert seen == [0, 1, 1]
    assert (model.parent / "stats.safetensors").read_bytes() == (model.parent / "unbroken.safetensors").read_bytes()
    assert not list(model.parent.glob("*.upfit-work"))


def test_only_statistics_are_replaced_by_statistics(model: Path) -> None:
    """Neither weights nor anything else, nor may they lie in the model's folder."""
    before = (model / "model.safetensors").read_bytes()
    (model.parent / "mine.safetensors").write_bytes(before)
    for name, message in (
        (f"{model.name}/model.safetensors", "no statistics file"),
        ("mine.safetensors", "no statistics file"),
    ):
        with pytest.raises(UpfitError, match=message):
            run(model, name, overwrite=True)
    with pytest.raises(UpfitError, match="overlaps the source"):
        run(model, f"{model.name}/stats.safetensors")
    assert (model / "model.safetensors").read_bytes() == (model.parent / "mine.safetensors").read_bytes() == before
    run(model)
    run(model, overwrite=True)


def test_another_text_starts_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that was left by a run with other settings is not taken up."""

    def failing(*arguments: Any) -> Any:
        if arguments[2] == 1:
            raise KeyboardInterrupt
        return gather_layer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(room, "gather_layer", failing)
        with pytest.raises(KeyboardInterrupt):
            run(model, length=32)
    with pytest.raises(UpfitError, match="begun with other settings"):
        run(model, length=64)
    run(model, length=64, overwrite=True)
    run(model, "fresh.safetensors", length=64)
    assert (model.parent / "stats.safetensors").read_bytes() == (model.parent / "fresh.safetensors").read_bytes()


def test_without_a_tokenizer_heads_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default, and it is said; and --method aligned is an error then, with a way out."""
    model = save_tiny(tmp_path / "model", tokenizer=False)
    told = converted(model, "auto", kv_heads=2)
    recipe = get_recipe("gqa")
    said = convert(recipe, str(model), tmp_path / "loud", recipe.options(2), Settings(verify=False), Output())
    assert said.kv_heads == [4, 2]
    note = "not aligned: it has no fast tokenizer that can be loaded here; the heads are averaged instead\n"
    assert capsys.readouterr().err.count(note) == 1
    mean = converted(model, "mean", kv_heads=2, method="mean")
    assert (told / "model.safetensors").read_bytes() == (mean / "model.safetensors").read_bytes()
    step = json.loads((told / "recipe.json").read_text())["steps"][-1]
    assert "no fast tokenizer" in step["measurements"]["not_aligned"] and step["options"]["method"] == "auto"
    assert step["measurements"]["method_ran"] == method_ran(step) == "mean"
    with pytest.raises(UpfitError, match="cannot be fitted on text: it has no fast tokenizer.*; choose --method mean$"):
        converted(model, "out", kv_heads=2, method="aligned")


def test_what_ran_is_kept_and_told(model: Path) -> None:
    """In recipe.json, by `show` and in the card; `auto` is only what was asked for. Heads that stay were not merged."""
    run(model)
    default = converted(model, "default", kv_heads=2, calibration=[str(model.parent / "stats.safetensors")])
    (step,) = provenance.read(default)
    assert (step["options"]["method"], step["measurements"]["method_ran"], method_ran(step)) == ("auto", "aligned", "aligned")
    assert CliRunner().invoke(app, ["show", str(default)]).stdout.count("convert gqa (aligned)") == 1
    assert "Heads merged: aligned." in Card(gather(str(default), []), "user/repo", "").text
    (step,) = provenance.read(converted(model, "first", kv_heads=2, method="first"))
    assert step["measurements"]["method_ran"] == method_ran(step) == "first"
    (step,) = provenance.read(converted(model, "same", kv_heads=4, method="first"))
    assert "method_ran" not in step["measurements"] and method_ran(step) is None


@pytest.mark.parametrize(
    "measured,asked,ran",
    [
        ({"calibration": {"tokens": 1000}, "layers": []}, "auto", "aligned"),
        ({"not_aligned": "it has no fast tokenizer"}, "auto", "mean"),
        ({}, "auto", None),
        ({}, "first", "first"),
        ({"lossless": True}, "mean", None),
        ({"method_ran": "<b>mean</b>"}, "mean", None),
    ],
)
def test_what_ran_is_read_from_older_folders_too(measured: dict[str, Any], asked: str, ran: str | None) -> None:
    assert method_ran(provenance.step("convert gqa", {}, {"method": asked}, measured)) == ran
    assert method_ran(provenance.step("convert diff", {}, {"method": asked}, measured)) is None


def test_a_dry_run_with_calibration_predicts(model: Path) -> None:
    """Fewer heads lose more, all of them lose nothing; from text and from the statistics file alike. Nothing is written."""
    run(model)
    before = sorted(model.parent.iterdir())
    answers = []
    for calibration in (["text.txt", "--calibration-tokens", "1k", "--calibration-length", "64"], ["stats.safetensors"]):
        arguments = ["convert", "gqa", str(model), str(model.parent / "out"), "--kv-heads", "2", "--dry-run", "--json"]
        done = CliRunner().invoke(
            app, [*arguments, "--calibration", str(model.parent / calibration[0]), *calibration[1:]], catch_exceptions=False
        )
        answers.append(json.loads(done.stdout)["sensitivity"])
    assert answers[0] == answers[1] and sorted(model.parent.iterdir()) == before
    totals = answers[0]["totals"]
    assert [row["kv_heads"] for row in totals] == [1, 2, 4]
    for name in ("attention_error", "output_error"):
        assert totals[0][name] > totals[1][name] > totals[2][name] == 0
    assert totals[2]["kv_bytes_per_token"] == 2 * totals[1]["kv_bytes_per_token"] == 4 * totals[0]["kv_bytes_per_token"]


def test_refit_beats_merging_alone(model: Path) -> None:
    """On a model of random weights: less drift of the stream on held-back text, and no refit leaves the MLP alone."""
    run(model)
    names = {}
    for refit in (True, False):
        out = converted(model, f"refit-{refit}", kv_heads=1, refit=refit, calibration=[str(model.parent / "stats.safetensors")])
        weights, source = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
        names[refit] = {name for name in source if not torch.equal(source[name], weights[name])}
    assert {name.split(".")[-2] for name in names[False]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names[False] <= names[True] and "down_proj" in {name.split(".")[-2] for name in names[True]}


def test_a_few_documents_tell_how_long_a_token_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 32 of them from the first on, evenly, however many there are."""
    read = list[str]()

    def encode(tokenizer: Any, texts: list[str]) -> Any:
        read.extend(texts)
        return [[list(texts[0].encode())]]

    monkeypatch.setattr(sample, "encode", encode)
    for count, step in ((1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)):
        read.clear()
        documents = [Document(f"document {number}", sample.USERS, str(number)) for number in range(count)]
        parts = sample._in_pieces(documents, None, 1000)
        assert read == ["\n".join(document.text for document in documents[::step])] and parts == documents
