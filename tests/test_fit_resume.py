"""Stopped after any layer, every fit goes on with the next one and ends with the bytes of an unbroken run."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import letter_tokenizer, save_tiny, tiny_llama
from tests.test_fit_work import stop_at
from tests.tiny import BUILDABLE, tiny_model
from tests.warm_python import ENVIRONMENT, shared_python
from upfit import provenance
from upfit.calibration import fit_work
from upfit.calibration.calibrate import calibrate
from upfit.calibration.layerwise import LayerwiseModel
from upfit.calibration.statistics_file import read_metadata
from upfit.convert import fitting
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.output import Meter, Output

QUIET = Output(quiet=True)
TEXT = "def f(x): return x + 1  # one more\nthe quick brown fox jumps over the lazy dog; 12 boxes of wine.\n" * 60
SIZES = {"calibration_tokens": "256", "calibration_length": 32}
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "aligned": ("gqa", {"kv_heads": 2}),
    "aligned, from a statistics file": ("gqa", {"kv_heads": 2, "calibration": ["stats.safetensors"]}),
    "aligned, without refit": ("mqa", {"refit": False}),
    "split": ("diff", {"variant": "split"}),
    "diffllama": ("diff", {"variant": "diffllama"}),
    "dex by entropy": ("diff", {"variant": "dex", "heads": "entropy"}),
    "gates of keys": ("cope", {"gates": "keys", "every": 2}),
    "faded rotary positions": ("cope", {"drop_rope": True}),
    "latents": ("mla", {"latent": 12, "rope_dim": 6}),
}


@dataclass
class Shop:
    """A tiny model of three layers, text, and a statistics file."""

    folder: Path

    def fit(self, name: str, out: str, output: Output = QUIET, **changes: Any) -> Path:
        verb, options = FITS[name]
        options = {"calibration": ["text.txt"], **({} if "statistics" in name else SIZES), **options, **changes}
        options["calibration"] = [str(self.folder / word) for word in options["calibration"]]
        recipe = get_recipe(verb)
        convert(
            recipe, str(self.folder / "model"), self.folder / out, recipe.options(**options), Settings(verify=False), output
        )
        return self.folder / out


def make_shop(folder: Path) -> Shop:
    (folder / "text.txt").write_text(TEXT)
    save_tiny(folder / "model", tiny_llama(num_hidden_layers=3))
    text = [str(folder / "text.txt")]
    calibrate(str(folder / "model"), text, folder / "stats.safetensors", "256", 32, None, False, QUIET)
    return Shop(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("fits"))


def content(folder: Path) -> dict[str, Any]:
    """All that a fit decides about a folder."""
    steps = json.loads((folder / "recipe.json").read_text())["steps"]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "recipe.json"}
    return {**files, "measurements": [step["measurements"] for step in steps]}


class Loads:
    """Which layers are loaded, as often as they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        load = LayerwiseModel.load

        def counting(stream: LayerwiseModel, index: int) -> None:
            self.layers.append(index)
            load(stream, index)

        patch.setattr(LayerwiseModel, "load", counting)

    def of(self, run: Callable[[], Any]) -> list[int]:
        self.layers.clear()
        run()
        return list(self.layers)


@pytest.mark.parametrize("name", FITS)
def test_stopped_is_resumed(shop: Shop, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = content(shop.fit(name, f"{name} whole"))
    tensors = 0 if name == "dex by entropy" else 1 if name == "gates of keys" else 2  # of the two layers that were run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3 + tensors, before=False, error=KeyboardInterrupt)
        shop.fit(name, name)
    assert not (shop.folder / name).exists()
    loads = Loads(monkeypatch)
    assert loads.of(lambda: shop.fit(name, name)) == [2]
    assert content(shop.folder / name) == whole
    assert [path.name for path in shop.folder.iterdir() if path.name.startswith((name + ".", "." + name))] == []


def test_stopped_again_and_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between renames of each layer in turn, the last time with all layers fitted; and what is said."""
    whole, said = content(shop.fit("split", "whole")), list[str]()
    output = Output(quiet=True)
    monkeypatch.setattr(output, "note", said.append)
    loads = Loads(monkeypatch)
    runs = []
    for number, before in ((2, True), (5, True), (3, False), (1, False), (1000, True)):
        with monkeypatch.context() as patch:
            stop_at(patch, number, before, error=KeyboardInterrupt)
            try:
                runs.append(loads.of(lambda: shop.fit("split", "again", output)))
            except KeyboardInterrupt:
                runs.append(list(loads.layers))
    assert runs == [[0], [0, 1], [1, 2], [2], []] and content(shop.folder / "again") == whole
    assert said == [f"going on after layer {done} of 3" for done in (1, 2, 3)]


def test_the_bar_of_a_stopped_fit_is_closed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what stopped it is told: a bar that is still drawn would hide the line."""
    output, bars = Output(quiet=True), list[str]()

    @contextmanager
    def progress(label: str, total: float) -> Iterator[Meter]:
        bars.append(label)
        try:
            yield Meter(label, total, True, None)
        finally:
            bars.remove(label)

    monkeypatch.setattr(output, "progress", progress)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        stop_at(patch, 0, before=True, error=KeyboardInterrupt)
        shop.fit("split", "closed", output)
    assert "store" in [entry.name for entry in stopped.traceback] and bars == []


@pytest.mark.slow
def test_another_fit_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other settings, text, statistics, weights, packages, threads: each is another fit; the same command is the same one."""
    shop, known = make_shop(tmp_path), list[str]()

    class Told(Exception):
        pass

    def tell(_: Path, identity: dict[str, Any]) -> None:
        known.append(json.dumps(identity, sort_keys=True))
        raise Told

    def ask(name: str, **changes: Any) -> str:
        with pytest.raises(Told):
            shop.fit(name, "out", **changes)
        return known[-1]

    monkeypatch.setattr(fitting, "FitWork", tell)
    first = [ask(name) for name in FITS]
    assert first == [ask(name) for name in FITS]
    ask("aligned", kv_heads=1)
    ask("aligned", refit=False)
    ask("split", refit=False)
    ask("gates of keys", gates="content")
    ask("gates of keys", span=1000)
    ask("aligned", calibration_length=64)
    ask("aligned", calibration_tokens="512")
    (tmp_path / "text.txt").write_text(TEXT.replace("fox", "cat"))
    ask("aligned")
    statistics = load_file(tmp_path / "stats.safetensors")
    statistics["model.layers.2.self_attn/keys"][0, 0] *= 1.5
    save_file(statistics, tmp_path / "stats.safetensors", metadata=read_metadata(tmp_path / "stats.safetensors"))
    ask("aligned, from a statistics file")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    ask("aligned")
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "versions", lambda: {"torch": "1.0"})
        ask("aligned")
    model = tiny_llama(num_hidden_layers=3)
    model.lm_head.weight.data[50, 16] += 1  # no layer's fit depends on it, but the model is another
    save_tiny(tmp_path / "model", model)
    ask("aligned")
    different = first + known[2 * len(FITS) :]
    assert len(set(different)) == len(different) == len(FITS) + 12


def test_another_fit_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken of work on text that has changed since, under its old name."""
    shop = make_shop(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5, before=False, error=KeyboardInterrupt)
        shop.fit("split", "out")
    (tmp_path / "text.txt").write_text(TEXT.replace("fox", "cat"))
    assert Loads(monkeypatch).of(lambda: shop.fit("split", "out")) == [0, 1, 2]
    assert content(tmp_path / "out") == content(shop.fit("split", "unbroken"))


# Whose layers share keys and values, have sinks, windows, experts, norms of keys, biases, a fused projection, no attention.
FAMILIES = ("gemma3n_text", "gemma4_text", "gpt_oss", "qwen3_moe", "qwen2", "phi3", "jamba", "olmo2")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """Stopped after each layer, whatever a family's layers hand on."""
    if model_type not in BUILDABLE:
        pytest.skip(f"the installed transformers has no {model_type}")
    tiny_model(model_type).save_pretrained(tmp_path / "source")
    letter_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = get_recipe("gqa")
    options = recipe.options(
        kv_heads=1, method="aligned", calibration=[str(tmp_path / "text.txt")], calibration_tokens="256", calibration_length=16
    )

    def fit(out: str) -> None:
        convert(recipe, str(tmp_path / "source"), tmp_path / out, options, Settings(verify=False), QUIET)

    fit("whole")
    loads = Loads(monkeypatch)
    runs = []
    while not (tmp_path / "out").exists():
        with monkeypatch.context() as patch:
            stop_when_told_of(patch)
            try:
                fit("out")
            except KeyboardInterrupt:
                runs.append(list(loads.layers))
                loads.layers.clear()
    assert runs == [[index] for index in range(len(runs))] and len(runs) > 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def stop_when_told_of(patch: pytest.MonkeyPatch) -> None:
    """Each run is stopped as soon as the JSON tells of a layer more."""

    def replace(source: Path, target: Path) -> None:
        os.rename(source, target)
        if Path(target).name == fit_work.FILE:
            raise KeyboardInterrupt

    patch.setattr(fit_work.os, "replace", replace)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_fit_resume import Shop
from upfit.calibration import fit_work

def replace(source, target, rename=os.rename):
    rename(source, target)
    if Path(target).name == "before-00002.state":
        os.kill(os.getpid(), signal.SIGKILL)

fit_work.os.replace = replace
Shop(Path(sys.argv[1])).fit("aligned", "killed")
"""


@pytest.mark.slow
def test_killed_is_resumed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that cannot even say goodbye, between the renames of a layer."""
    (shop.folder / "killed.py").write_text(KILLED)
    done = subprocess.run([shared_python(), str(shop.folder / "killed.py"), str(shop.folder)], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL and not (shop.folder / "killed").exists()
    assert Loads(monkeypatch).of(lambda: shop.fit("aligned", "killed")) == [1, 2]
    assert content(shop.folder / "killed") == content(shop.fit("aligned", "not killed"))
