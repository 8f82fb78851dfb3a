"""Checkpoints and models that were damaged or changed meanwhile are noticed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.folders import save_tiny, tiny_llama
from tests.test_uptrain_resume import Interrupting, flip, stopped
from tests.uptraining import Workshop, make_workshop, one_thread, weights
from upfit.checkpoint.content import PIECE, content_hash
from upfit.errors import UpfitError
from upfit.uptrain.model.model_traits import fingerprint
from upfit.uptrain.run.state import Counters, Workspace


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_thread():
        yield make_workshop(tmp_path_factory.mktemp("shop"))


def damage(checkpoint: Path, how: str) -> None:
    if how == "partial":
        checkpoint.rename(checkpoint.with_suffix(".tmp"))
    elif how == "unfinished":
        (checkpoint / "trainer.json").unlink()
    elif how == "truncated":
        content = (checkpoint / "__0_0.distcp").read_bytes()
        (checkpoint / "__0_0.distcp").write_bytes(content[:-100])
    else:
        size = (checkpoint / ".metadata").stat().st_size
        (checkpoint / ".metadata").write_bytes(b"\xff" * size)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["partial", "unfinished", "truncated", "garbled"])
def test_a_damaged_checkpoint_is_passed_over(shop: Workshop, tmp_path: Path, how: str) -> None:
    shop.run(tmp_path / "whole")
    place = stopped(shop, tmp_path)
    assert [path.name for path in Workspace(tmp_path / "out.upfit-work").checkpoints()] == ["step-00000009", "step-00000008"]
    damage(place / "step-00000009", how)
    assert [path.name for path in Workspace(tmp_path / "out.upfit-work").checkpoints()] == ["step-00000008"]
    shop.run(tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_one_bit_makes_another_content(tmp_path: Path) -> None:
    """Wherever it lies; and what is the same in another place has the same hash."""
    content = bytes(range(256)) * 4 * 2**10
    first, second = tmp_path / "first", tmp_path / "second"
    for size in (0, 1, 3 * 2**20, PIECE, PIECE + 1, 2 * PIECE + 5):
        first.write_bytes((content * (size // len(content) + 1))[:size])
        shutil.copyfile(first, second)
        assert content_hash(first) == content_hash(second)
        if size:
            flip(second)
            assert content_hash(first) != content_hash(second)
            flip(second)
            assert content_hash(first) == content_hash(second)


def test_a_bit_in_the_middle_of_a_checkpoint_or_a_model_is_noticed(tmp_path: Path) -> None:
    """Both are larger than what their beginnings and ends would tell of."""
    workspace = Workspace(tmp_path / "out")
    workspace.partial(1).mkdir(parents=True)
    (workspace.partial(1) / "__0_0.distcp").write_bytes(bytes(5 * 2**20))
    checkpoint = workspace.publish(Counters(step=1), {}, 1)
    assert workspace.newest() == checkpoint
    flip(checkpoint / "__0_0.distcp")
    assert workspace.newest() is None
    model = save_tiny(tmp_path / "model", tiny_llama(hidden_size=256, intermediate_size=1024))
    known = fingerprint(model)
    assert fingerprint(model) == known and (model / "model.safetensors").stat().st_size > 5 * 2**20
    flip(model / "model.safetensors")
    assert fingerprint(model) != known


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["teacher", "model"])
def test_a_model_that_was_changed_meanwhile_cannot_be_resumed_with(shop: Workshop, tmp_path: Path, changed: str) -> None:
    teacher, student = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (shop.teacher, shop.student))
    mine = Workshop(teacher, student, shop.data)
    mine.run(tmp_path / "out", output=Interrupting(3), teacher=str(teacher))
    flip({"teacher": teacher, "model": student}[changed] / "model.safetensors")
    with pytest.raises(UpfitError, match=f"{changed}'s fingerprint"):
        mine.run(tmp_path / "out", resume=True, teacher=str(teacher))
