"""Damaged headers, indexes and configs: refused in one line, or planned. `benchmarks/fuzz_convert.py` tries many more."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_convert import Target, damaged, written_files
from upfit.checkpoint.safetensors_header import read_header
from upfit.errors import UpfitError


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("hostile") / "scratch")


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["config.json", "model.safetensors.index.json", "shard"]), st.integers(0, 2**32))
def test_what_is_damaged_is_refused_or_planned(target: Target, name: str, seed: int) -> None:
    file = next(one for one in target.files if one == name or (name == "shard" and one.endswith(".safetensors")))
    with written_files(target.folder.parent) as outside:
        target.run(file, damaged(target.files[file], file, random.Random(seed)), False)
    assert not outside
    assert not target.failures, (target.kept / "00001" / "why.txt").read_text("utf-8")


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_refused(tmp_path: Path, content: bytes) -> None:
    """What is read covers the file exactly, whatever the header claims."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        infos = read_header(path)
    except UpfitError as error:
        assert "\n" not in str(error)
        return
    assert sum(info.nbytes for info in infos) + (infos[0].start if infos else len(content)) == len(content)
