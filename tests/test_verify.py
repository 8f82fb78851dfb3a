"""Each check of a result by itself: what one of them lets pass another one might hide."""

import gc
import json
import os
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import save_tiny, tiny_llama
from tests.tiny import tiny_model
from upfit import provenance
from upfit.architecture.layers import bind
from upfit.architecture.loading import garbage_collected
from upfit.architecture.planned import check_against_class
from upfit.checkpoint import finished_shards
from upfit.checkpoint.copy_bytes import CopiedRange
from upfit.checkpoint.execute import outline
from upfit.checkpoint.finished_shards import JOURNAL, FinishedShards
from upfit.checkpoint.plan import Plan, Rule
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.safetensors_header import read_exactly
from upfit.convert import conversion, verify
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.convert.result import Conversion, Verification
from upfit.convert.verify import CLOSE, Promise, compare, tolerance
from upfit.errors import UpfitError
from upfit.output import Output

FILE = "model.safetensors"
EMPTY = Verification("", "")


def run(source: Path, out: Path, recipe: str = "gqa", options: dict[str, Any] | None = None, **settings: Any) -> Conversion:
    known = get_recipe(recipe)
    chosen = known.options(**(options or {"kv_heads": 2, "method": "mean"}))
    return convert(known, str(source), out, chosen, Settings(**settings), Output(quiet=True))


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 90, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tolerated", "error", "passes"), [(1e-4, 9e-5, True), (1e-4, 1.1e-4, False), (0.0, 1e-7, False)])
def test_logits_are_as_near_as_was_promised(tolerated: float, error: float, passes: bool) -> None:
    before = logits()
    after = before.clone()
    after[3, 5] += error * before.abs().max()
    if passes:
        assert compare(EMPTY, before, after, None, Promise(tolerated)).equal is False
        return
    with pytest.raises(UpfitError, match="where this setting promises equality"):
        compare(EMPTY, before, after, None, Promise(tolerated))


def test_what_rounding_is_depends_on_the_type() -> None:
    assert [tolerance(name, moved=False) for name in ("float32", "float64", "bfloat16")] == [1e-4, 1e-8, 3e-2]
    assert tolerance("float64", moved=True) == 1e-6 and CLOSE["float64"] == 1e-8
    assert compare(EMPTY, logits(), logits(), None, Promise(0.0)).equal is True
    assert compare(EMPTY, logits(), logits(1), None, Promise()).equal is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    after = logits()
    after[0, 0] = value
    with pytest.raises(UpfitError, match="its logits are not finite"):
        compare(EMPTY, logits(), after, None, Promise())


def test_the_loss_has_an_interval_over_pieces_of_the_text() -> None:
    ids = torch.randint(0, 90, (1, 40))
    report = compare(EMPTY, logits(), logits() * 1.1, ids, Promise())
    assert report.loss is not None and report.source_loss is not None and report.loss_interval is not None
    assert 0 < report.loss_interval < 1
    short = compare(EMPTY, logits()[:9], logits()[:9] * 1.1, ids[:, :9], Promise())
    assert short.loss is not None and short.loss_interval is None


def poison(folder: Path, name: str) -> Path:
    tensors = load_file(folder / FILE)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def test_the_engine_computes_nothing_that_is_not_finite(tmp_path: Path) -> None:
    """Without verify too."""
    source = poison(save_tiny(tmp_path / "source"), "model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(UpfitError, match="k_proj.weight' is not finite as F32"):
        run(source, tmp_path / "out", verify=False)


def test_verify_sees_what_only_passed_through(tmp_path: Path) -> None:
    source = poison(save_tiny(tmp_path / "source"), "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(UpfitError, match="its logits are not finite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", verify=False)


def test_a_rule_that_writes_another_shape_than_the_class_wants_is_a_defect(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rule = Rule((name,), (name,), lambda tensors: {name: tensors[name][:-1]}, "cut")
    with open_checkpoint(save_tiny(tmp_path / "source")) as checkpoint:
        plan = Plan(checkpoint.config, (rule,))
        architecture = bind(checkpoint.config, checkpoint.tensors)
        with pytest.raises(ValueError, match=r"has shape \(47, 32\), the class wants \(48, 32\)"):
            check_against_class(plan, outline(plan, checkpoint, None), architecture)


def test_a_tensor_beyond_the_class_has_the_shape_of_the_one_that_it_is_like(tmp_path: Path) -> None:
    """In every entry, for nothing else is known of it; one that is like none may have any shape."""
    own, names = "model.layers.0.self_attn.k_proj.weight", ("mtp.first.weight", "mtp.second.weight")
    with open_checkpoint(save_tiny(tmp_path / "source")) as checkpoint:
        architecture = bind(checkpoint.config, checkpoint.tensors)

        def check(rows: int, like: str) -> None:
            made = {own: 32, names[0]: 32, names[1]: rows}
            rule = Rule((own,), tuple(made), lambda tensors: {name: tensors[own][:n] for name, n in made.items()}, "cut")
            plan = Plan(checkpoint.config, (rule,))
            check_against_class(plan, outline(plan, checkpoint, None), architecture, dict.fromkeys(names, like))

        for rows, like in ((32, own), (32, ""), (31, "")):
            check(rows, like)
        with pytest.raises(ValueError, match=r"'mtp.second.weight' has shape \(31, 32\), and '.*' has \(32, 32\)"):
            check(31, own)


@pytest.fixture
def lines(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A finished shard of three pieces in a work folder, and its line in the journal."""
    folder, content = tmp_path / "work", os.urandom(90)
    folder.mkdir()
    (folder / "shard").write_bytes(content)
    kept = FinishedShards(folder, {}, lambda *_: b"")
    (folder / "shard").write_bytes(content)
    kept.add(
        "shard", 90, [CopiedRange(start, 30, finished_shards.zlib.crc32(content[start : start + 30])) for start in (0, 30, 60)]
    )
    return folder, json.loads((folder / JOURNAL).read_text().splitlines()[1])


def kept_with(folder: Path, line: dict[str, Any]) -> bool:
    first = (folder / JOURNAL).read_text().splitlines()[0]
    (folder / JOURNAL).write_text(f"{first}\n{json.dumps(line)}\n")
    return "shard" in FinishedShards(folder, {}, lambda *_: b"").verified


@pytest.mark.parametrize("left", [(0, 1, 2), (2, 0, 1), (0, 2), (0, 1), (1, 2), (0, 0, 1, 2), ()])
def test_a_shard_stands_when_its_pieces_cover_it(lines: tuple[Path, dict[str, Any]], left: tuple[int, ...]) -> None:
    """A piece that nobody told of may be anything: with a gap in front, in the middle or behind, it is written again."""
    folder, line = lines
    pieces = [line["pieces"][index] for index in left]
    assert kept_with(folder, line | {"pieces": pieces}) == (sorted(left) == [0, 1, 2])


def test_a_gap_of_the_size_of_an_overlap_is_a_gap(lines: tuple[Path, dict[str, Any]]) -> None:
    folder, line = lines
    first, second, _ = line["pieces"]
    assert not kept_with(folder, line | {"pieces": [first, second, [30, 60, *second[2:]]]})


def test_a_shard_whose_source_cannot_be_read_any_more_is_made_again(lines: tuple[Path, dict[str, Any]]) -> None:
    """A piece that was copied is compared with the source's, which may have become shorter since."""
    folder, line = lines
    content = (folder / "shard").read_bytes()

    first = (folder / JOURNAL).read_text().splitlines()[0]
    copied = line | {"pieces": [[start, 30, None, "source", start] for start in (0, 30, 60)]}
    for size in (90, 89):

        def read(_: str, nbytes: int, start: int, size: int = size) -> bytes:
            if start + nbytes > size:
                raise UpfitError("the file ends before that")
            return content[start : start + nbytes]

        (folder / JOURNAL).write_text(f"{first}\n{json.dumps(copied)}\n")
        assert ("shard" in FinishedShards(folder, {}, read).verified) == (size == 90)


@pytest.mark.parametrize("step", [1, 7, 90, 100])
def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """However many are read at once."""
    monkeypatch.setattr(finished_shards, "STEP", step)
    content = os.urandom(90)
    (tmp_path / "file").write_bytes(content)
    assert finished_shards.crc_of(tmp_path / "file") == zlib.crc32(content)


def test_a_shard_reaches_the_disk_before_its_line_and_the_line_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.stat().st_size if path.is_file() else 0))
        real(descriptor)

    original = conversion.write_shards

    def watched(shards: Any, *work: Any) -> None:
        monkeypatch.setattr(os, "fsync", noted)
        original(shards, *work)
        monkeypatch.setattr(os, "fsync", real)
        size = (work[2] / JOURNAL).stat().st_size
        assert [name for name, _ in synced] == [FILE, JOURNAL] and synced[1][1] == size

    monkeypatch.setattr(conversion, "write_shards", watched)
    run(save_tiny(tmp_path / "source"), tmp_path / "out", verify=False)


def lossless(folder: Path) -> Any:
    return provenance.read(folder)[-1]["measurements"].get("lossless")


def test_lossless_is_bit_equal_or_says_how_near(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    run(source, tmp_path / "same", options={"kv_heads": 4}, verify=False)
    run(source, tmp_path / "fewer", verify=False)
    run(source, tmp_path / "pairs", "diff", {"variant": "v2"}, verify=False)
    run(source, tmp_path / "static", "diff", {"variant": "v2-static"}, verify=False)
    run(source, tmp_path / "half", options={"kv_heads": 4}, dtype="bfloat16", verify=False)
    assert [lossless(tmp_path / name) for name in ("same", "pairs")] == [True, True]
    assert lossless(tmp_path / "fewer") is None
    assert lossless(tmp_path / "static") == {"tolerance": 1e-4, "dtype": ""}
    assert lossless(tmp_path / "half") == {"tolerance": 0.0, "dtype": "bfloat16"}


def test_the_start_of_differential_attention_is_held_to_equality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight off by its last bit."""
    original = conversion.write_shards

    def nearly(shards: Any, rules: Any, checkpoint: Any, folder: Path, *rest: Any) -> None:
        original(shards, rules, checkpoint, folder, *rest)
        with open(folder / FILE, "r+b") as file:
            place = shards[0].offsets["model.layers.0.self_attn.v_proj.weight"]
            data = torch.frombuffer(read_exactly(file.fileno(), 4096, place), dtype=torch.float32)
            os.pwrite(file.fileno(), torch.nextafter(data, torch.tensor(9e9)).numpy().tobytes(), place)

    monkeypatch.setattr(conversion, "write_shards", nearly)
    source = save_tiny(tmp_path / "source")
    with pytest.raises(UpfitError, match="promises equality;"):
        run(source, tmp_path / "out", "diff", {"variant": "v2"}, verify_bytes=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_held_against_the_source_in_that_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    source = save_tiny(tmp_path / "source")
    recipe, options = ("gqa", {"kv_heads": 4}) if dtype == "float16" else ("diff", {"variant": "v2"})
    answer = run(source, tmp_path / "same", recipe, options, dtype=dtype)
    assert (
        isinstance(answer.verify, Verification)
        and answer.verify.equal
        and answer.verify.numbers == f"logits equal the source's in {dtype} bit for bit"
    )
    original = conversion.write_shards

    def wrong(shards: Any, rules: Any, checkpoint: Any, folder: Path, *rest: Any) -> None:
        original(shards, rules, checkpoint, folder, *rest)
        with open(folder / FILE, "r+b") as file:
            file.seek(shards[0].offsets["model.layers.1.mlp.down_proj.weight"])
            file.write(bytes(1024))

    monkeypatch.setattr(conversion, "write_shards", wrong)
    with pytest.raises(UpfitError, match=f"differ from the source's in {dtype}"):
        run(source, tmp_path / "wrong", options={"kv_heads": 4}, dtype=dtype, verify_bytes=False)


def test_what_a_class_keeps_in_float32_is_rounded_for_the_comparison(tmp_path: Path) -> None:
    """Routers and their biases are, in many a mixture of experts; a file in bfloat16 has them rounded."""
    tiny_model("ernie4_5_moe").save_pretrained(tmp_path / "source")
    answer = run(tmp_path / "source", tmp_path / "out", options={"kv_heads": 4}, dtype="bfloat16")
    assert isinstance(answer.verify, Verification) and answer.verify.equal


def test_a_source_wider_than_its_class_runs(tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "source")
    answer = run(tmp_path / "source", tmp_path / "out", options={"kv_heads": 4}, dtype="float32")
    assert isinstance(answer.verify, Verification) and answer.verify.equal


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen already", "as Python begins"])
def test_what_a_check_made_is_collected(frozen: bool) -> None:
    """What was there before is not looked through, and whoever had frozen it finds it frozen afterwards."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    (gc.freeze if frozen else gc.unfreeze)()
    try:
        with garbage_collected():
            old, made = gc.get_freeze_count(), weakref.ref(Cycle())
        assert made() is None and old > 0
        assert (gc.get_freeze_count() > 0) is frozen
    finally:
        gc.freeze()  # as conftest.py has it


@pytest.mark.parametrize("speed", [3.0, 1.0])
def test_a_large_model_is_verified_in_the_faster_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], speed: float
) -> None:
    """And what is promised to be equal bit for bit is."""
    save_tiny(tmp_path / "source", tiny_llama().bfloat16())
    computed: list[torch.dtype] = []

    def compared(report: Verification, before: torch.Tensor, after: torch.Tensor, *more: Any) -> Verification:
        computed.append(after.dtype)
        return compare(report, before, after, *more)

    monkeypatch.setattr(verify, "LARGE", 0)
    monkeypatch.setattr(verify, "_seconds", lambda dtype: 1.0 if dtype == torch.float32 else speed)
    monkeypatch.setattr(verify, "compare", compared)
    known = get_recipe("diff")
    answer = convert(known, str(tmp_path / "source"), tmp_path / "out", known.options(), Settings(), Output())
    assert isinstance(answer.verify, Verification) and answer.verify.equal
    assert computed == [torch.float32 if speed > 2 else torch.bfloat16]
    told = "verifying in float32, which this machine multiplies 3.0 times as fast as bfloat16"
    assert (told in capsys.readouterr().err) == (speed > 2)


@pytest.mark.parametrize(("times", "worth"), [(1.4, False), (1.6, True)])
def test_float32_is_taken_where_it_is_half_as_fast_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, worth: bool
) -> None:
    """For a large model, stored in bfloat16, that memory has room for in twice the size."""
    save_tiny(tmp_path / "torch.bfloat16", tiny_llama().bfloat16())
    save_tiny(tmp_path / "torch.float16", tiny_llama().half())
    save_tiny(tmp_path / "torch.float32")
    monkeypatch.setattr(verify, "LARGE", 0)
    monkeypatch.setattr(verify, "_seconds", lambda dtype: 3.0 if dtype == torch.float32 else 3.0 * times)
    faster = [verify.faster_in_float32(tmp_path / str(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert faster == [pytest.approx(times) if worth else None, None, None]
    size = verify._weight_bytes(tmp_path / "torch.bfloat16")
    for available in (2.5, 2.7):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available * size))  # noqa: B023
        assert (verify.faster_in_float32(tmp_path / "torch.bfloat16") is not None) == (worth and available > 2 * 1.3)
    monkeypatch.setattr(verify, "LARGE", size + 1)
    assert verify.faster_in_float32(tmp_path / "torch.bfloat16") is None


def test_what_does_not_hold_in_float32_is_looked_at_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "source", tiny_llama().bfloat16())
    computed: list[torch.dtype] = []

    def compared(report: Verification, before: torch.Tensor, after: torch.Tensor, *more: Any) -> Verification:
        computed.append(after.dtype)
        return compare(report, before, after + (1 if after.dtype == torch.float32 else 0), *more)

    monkeypatch.setattr(verify, "LARGE", 0)
    monkeypatch.setattr(verify, "_seconds", lambda dtype: 1.0 if dtype == torch.float32 else 3.0)
    monkeypatch.setattr(verify, "compare", compared)
    answer = run(tmp_path / "source", tmp_path / "out", "diff", {"variant": "v2"})
    assert isinstance(answer.verify, Verification) and answer.verify.equal
    assert computed == [torch.float32, torch.bfloat16]
