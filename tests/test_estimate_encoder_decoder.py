"""What a dry run says of the time and memory of an encoder-decoder: its encoder and its cross-attention are in the count."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.test_estimate import FAR, run
from tests.test_examples import PAIRS, save_t5, write
from tests.test_merging_everywhere import saved
from tests.tiny import tiny_model
from upfit.architecture.attention import Geometry
from upfit.architecture.layers import open_model
from upfit.calibration import estimate
from upfit.calibration.estimate import Block, Encoder, Windows, Work, block_of, encoded, encoder_of, forward
from upfit.calibration.sample_for import sample_for
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.gqa import cost, fit
from upfit.convert.gqa.choice import Choice
from upfit.convert.recipe import FitContext
from upfit.errors import UpfitError
from upfit.output import Output

QUIET = Output(quiet=True)
SHAPE = Geometry(8, 8, 32, 32)
OWN, CROSS = (Block(SHAPE, 900_000, 256, mlp, 2 * 256 * 256, cross) for mlp, cross in ((0, False), (1024, True)))


def work_of(folder: Path, calibration: list[str]) -> Work:
    with open_checkpoint(folder) as checkpoint:
        _, architecture = open_model(checkpoint)
        context = FitContext(folder, checkpoint, architecture, folder / "fit", QUIET)
        return cost.work(context, Choice(1, True, calibration, None, None, "text"))


def products(block: Block, *windows: Windows, kv_heads: int = 2) -> float:
    return cost.aligned(block, kv_heads, windows).products


@pytest.mark.parametrize("block", [OWN, CROSS], ids=["self", "cross"])
def test_more_that_is_read_or_written_takes_longer(block: Block) -> None:
    base = Windows(100, 40, 300)
    for more in (Windows(200, 40, 300), Windows(100, 80, 300), Windows(100, 40, 600)):
        assert products(block, more) > products(block, base)
        assert cost.aligned(block, 2, [more]).bytes > cost.aligned(block, 2, [base]).bytes


def test_what_is_read_costs_the_cross_attention_more() -> None:
    """Its scores are of every position that was read; the other one runs beside it."""
    short, long = Windows(100, 40, 40), Windows(100, 40, 400)
    assert products(CROSS, long) - products(CROSS, short) > 2 * (products(OWN, long) - products(OWN, short)) > 0


@pytest.mark.parametrize(
    ("block", "counted", "nbytes"), [(OWN, 1.40733e11, 1.28196e08), (CROSS, 3.42471e11, 4.34904e08)], ids=["self", "cross"]
)
def test_counts_are_those_that_were_held_against_conversions(block: Block, counted: float, nbytes: float) -> None:
    """Whoever counts otherwise, or changes what is done, measures again."""
    work = cost.aligned(block, 2, [Windows(100, 40, 300), Windows(8, 120, 1500)])
    assert (work.products, work.bytes) == (pytest.approx(counted, rel=1e-5), pytest.approx(nbytes, rel=1e-5))


def test_passes_by_hand() -> None:
    """Two windows of 3 tokens, and 5 positions read beside each; keys and values of those are made once."""
    shape, windows = Geometry(2, 2, 4, 4), Windows(2, 3, 5)
    block = Block(shape, 1000, 8, 0, reading=100)
    assert forward(block, windows) == 2 * 3 * (900 + (3 + 5) * 2 * 8) + 2 * 5 * 100
    assert encoded(Encoder(layers=2, weights=700, hidden=8), windows) == 2 * 5 * (700 + 2 * 2 * 5 * 8)
    assert forward(block, Windows(2, 3)) == 2 * 3 * (900 + 3 * 2 * 8)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_blocks_and_encoder_of_a_checkpoint(model_type: str, tmp_path: Path) -> None:
    model: Any = tiny_model(model_type, d_model=WIDTH)
    model.save_pretrained(tmp_path / "source")
    with open_checkpoint(tmp_path / "source") as checkpoint:
        opened, architecture = open_model(checkpoint)
        blocks = [block_of(layer, opened.tensors, architecture.layers) for layer in architecture.layers]
        encoder = encoder_of(opened.tensors, blocks[0].hidden)
    assert [(block.cross, block.mlp) for block in blocks] == [(False, 0), (True, 48)] * 2
    assert {block.reading for block in blocks} == {2 * WIDTH * (32 if model_type == "t5" else WIDTH)}
    layers = model.get_decoder().block if model_type == "t5" else model.get_decoder().layers
    assert blocks[0].weights == blocks[1].weights == sum(p.numel() for p in layers[1].parameters()) + ALONE[model_type]
    own = [p.numel() for name, p in model.get_encoder().named_parameters() if "embed" not in name]
    assert (encoder.layers, encoder.weights) == (len(model.get_encoder().layers if model_type != "t5" else layers), sum(own))


WIDTH = 64
ALONE = {"t5": 32 * 4, "bart": 0, "whisper": 0}  # T5's first layer alone has the biases by position


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_sizes_are_those_of_the_batches(model_type: str, tmp_path: Path) -> None:
    options = saved(model_type, tmp_path)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        sample = sample_for(tmp_path / "source", checkpoint, options["calibration"], None, None, QUIET)
    shapes = [
        (*batch.keywords["decoder_input_ids"].shape, batch.keywords["input_ids"].shape[1]) for batch in sample.batches()[0]
    ]
    assert cost.windows_in(sample) == [Windows(*shape) for shape in shapes] and len(shapes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_count_is_of_what_is_multiplied(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's passes, both attentions' fits and the MLP's, of a model that is not too small for it."""
    counts: list[float] = []
    real = fit.convert_layers

    def counting(*arguments: object) -> None:
        with FlopCounterMode(display=False) as counter:
            real(*arguments)  # type: ignore[arg-type]
        counts.append(counter.get_total_flops() / 2)

    monkeypatch.setattr(fit, "convert_layers", counting)
    for name, value in (("A_NUMBER", 0), ("A_LAYER", 0), ("A_DOUBLE", 1)):
        monkeypatch.setattr(estimate, name, value)
    options = saved(model_type, tmp_path, **WIDE[model_type])
    expected = work_of(tmp_path / "source", options["calibration"]).products
    run(tmp_path / "source", tmp_path / "out", dry_run=False, kv_heads=1, **options)
    assert expected / FAR < counts[0] < expected * FAR


WIDE = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 256},
    "bart": {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
}


def test_a_dry_run_tells_both_and_reads_what_it_is_calibrated_on(tmp_path: Path) -> None:
    source, few, many = save_t5(tmp_path / "source"), tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    works = [work_of(source, [str(write(path, PAIRS * times))]) for path, times in ((few, 1), (many, 20))]
    assert works[1].products > works[0].products and works[1].bytes > works[0].bytes
    told = run(source, tmp_path / "out", kv_heads=1, calibration=[str(many)])
    assert told.estimate is not None and str(told).splitlines()[1] == told.estimate.words()
    assert told.kv_bytes_per_token == told.cross_bytes_per_position == [128, 64]


def test_a_model_that_hears_is_estimated_as_it_will_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On recordings; without any its heads will be averaged, which the dry run says too."""
    pytest.importorskip("soundfile")
    from tests.test_examples_sound import audio_folder, save_whisper

    source = save_whisper(tmp_path / "source")
    heard = run(source, tmp_path / "out", kv_heads=1, calibration=[str(audio_folder(tmp_path / "speech"))])
    assert heard.estimate is not None and "aligned" in heard.tensors[0].rule
    averaged = run(source, tmp_path / "out", kv_heads=1)
    assert averaged.estimate is not None and averaged.tensors[0].rule.endswith("mean")
    assert averaged.estimate.seconds[1] <= heard.estimate.seconds[1]
    with pytest.raises(UpfitError, match="hears, and there is no --calibration"):
        run(source, tmp_path / "out", kv_heads=1, method="aligned")
