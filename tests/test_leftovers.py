"""What a class does not take is never passed on in a geometry that the new config denies."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import save_tiny
from tests.tiny import auto_class, tiny_model
from upfit import provenance
from upfit.architecture.attention import Geometry
from upfit.architecture.leftovers import _many, _widths, patterns, without_prediction
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.output import Output

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"


class Notes(Output):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def run(source: Path, out: Path, recipe: str = "gqa", verify: bool = False, **options: Any) -> list[str]:
    notes, known = Notes(), get_recipe(recipe)
    options = options or {"kv_heads": 2, "method": "mean"}
    convert(known, str(source), out, known.options(**options), Settings(verify=verify), notes)
    return notes.told


def edit(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    tensors = load_file(folder / FILE)
    save_file(tensors | change(tensors), folder / FILE, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def beyond(target: str, model: str = "model.layers.1.") -> Callable[[Tensors], Tensors]:
    """Another layer like `model`, called `target`, with what else a prediction layer has."""

    def change(tensors: Tensors) -> Tensors:
        width = tensors["model.norm.weight"].numel()
        like = {name.replace(model, target): value.clone() for name, value in tensors.items() if name.startswith(model)}
        return like | {f"{target}eh_proj.weight": torch.randn(width, 2 * width), f"{target}enorm.weight": torch.ones(width)}

    return change


def keys(folder: Path) -> dict[str, int]:
    """Rows of every key projection."""
    return {name: len(value) for name, value in load_file(folder / FILE).items() if name.endswith("k_proj.weight")}


def test_a_prediction_layer_is_converted_with_the_others(tmp_path: Path) -> None:
    tiny_model("glm4_moe").save_pretrained(tmp_path / "source")
    source = edit(tmp_path / "source", beyond("model.layers.2."), num_nextn_predict_layers=1)
    before = keys(source)
    notes = run(source, tmp_path / "out", kv_heads=1, method="mean", verify=True)
    after = keys(tmp_path / "out")
    assert before.keys() == after.keys() and "model.layers.2.self_attn.k_proj.weight" in after and len(set(after.values())) == 1
    assert any("model.layers.2.self_attn.k_proj" in note and "changed as in its own layers" in note for note in notes)
    (step,) = provenance.read(tmp_path / "out")
    assert step["unused"]["converted"]["model.layers.2.self_attn.k_proj.weight"] == 1
    config: Any = auto_class("glm4_moe").from_pretrained(tmp_path / "out").config
    assert config.num_nextn_predict_layers == 1
    config.num_hidden_layers = 3
    auto_class("glm4_moe").from_pretrained(tmp_path / "out", config=config)


def test_its_heads_become_what_those_of_a_layer_would(tmp_path: Path) -> None:
    """A layer beyond the class's that is a copy of its last one is a copy of it afterwards, whatever its name."""
    for name in ("model.layers.2.", "mtp.layers.0.", "model.layers.2.mtp_block."):
        folder = tmp_path / name
        source = edit(save_tiny(folder / "source", tokenizer=False), beyond(name))
        run(source, folder / "out")
        run(source, folder / "repeated", kv_heads=1, method="first")
        for out in (folder / "out", folder / "repeated"):
            tensors = load_file(out / FILE)
            for part in ("q", "k", "v", "o"):
                twin, model = (f"{where}self_attn.{part}_proj.weight" for where in (name, "model.layers.1."))
                assert torch.equal(tensors[twin], tensors[model]), twin


@pytest.mark.parametrize("name", ["model.layers.2.", "mtp.layers.0.", "model.mtp_block.0."])
def test_what_cannot_be_converted_is_left_out_and_not_looked_for(tmp_path: Path, name: str) -> None:
    source = edit(save_tiny(tmp_path / "source", tokenizer=False), beyond(name), num_nextn_predict_layers=1, use_mtp=True)
    edit(source, lambda tensors: {"mtp_norm.weight": torch.ones(32)})
    notes = run(source, tmp_path / "out", "diff", variant="v2")
    tensors, config = load_file(tmp_path / "out" / FILE), json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [one for one in tensors if one.startswith(name)]
    assert ("mtp_norm.weight" in tensors) == ("mtp" not in name)
    assert (config["num_nextn_predict_layers"], config["use_mtp"]) == (0, False)
    assert any("left out" in note and name in note for note in notes)
    assert sum(provenance.read(tmp_path / "out")[0]["unused"]["left_out"].values()) >= 10


ATTENTION = "model.layers.0.self_attn."
STRAYS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "scale-a-head": (ATTENTION + "k_scale", (4,), False),
    "scale-in-the-projection": (ATTENTION + "v_proj.v_scale", (4,), False),
    "one-scale": (ATTENTION + "k_scale", (1,), True),
    "a-number": (ATTENTION + "k_proj.k_scale", (), True),
    "bias": (ATTENTION + "k_proj.bias", (32,), False),
    "adapter": (ATTENTION + "v_proj.lora_B.weight", (32, 3), False),
    "norm": ("model.layers.0.extra_norm.weight", (32,), True),
    "buffer": (ATTENTION + "rotary_emb.inv_freq", (3,), True),
    "other-attention": ("draft.attention.wk.weight", (32, 32), False),
    "other-width": ("vision.attention.wk.weight", (48, 24), True),
    "no-attention": ("head.dense.weight", (32, 32), True),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_a_stray_stays_only_where_it_has_nothing_to_do_with_heads(tmp_path: Path, kind: str) -> None:
    name, shape, stays = STRAYS[kind]
    source = edit(save_tiny(tmp_path / "source", tokenizer=False), lambda tensors: {name: torch.rand(shape)})
    notes = run(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / FILE)
    assert (name in tensors) == stays and any(name in note for note in notes)
    assert not stays or torch.equal(tensors[name], load_file(source / FILE)[name])
    (told,) = provenance.read(tmp_path / "out")[0]["unused"].items()
    assert told == ("passed_on" if stays else "left_out", {name: 1})


@pytest.mark.parametrize("model_type", ["nemotron_h", "recurrent_gemma"])
def test_an_attention_is_known_by_its_layer_whatever_it_is_called(tmp_path: Path, model_type: str) -> None:
    """Here it is a `mixer` or a `temporal_block`, as layers without attention have."""
    tiny_model(model_type).save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / FILE)
    name = next(name for name in stored if name.endswith("k_proj.weight")).replace("k_proj.weight", "k_scale")
    run(edit(tmp_path / "source", lambda tensors: {name: torch.rand(4)}), tmp_path / "out")
    assert stored.keys() == load_file(tmp_path / "out" / FILE).keys()


@pytest.mark.parametrize(("model_type", "model", "name"), [
    ("qwen3_next", "model.layers.{}.", "mtp.layers.0."),
    ("phi3", "model.layers.1.", "model.layers.2."),
])  # fmt: skip
def test_layers_of_other_builds(tmp_path: Path, model_type: str, model: str, name: str) -> None:
    """Qwen3-Next's prediction layer is one with gated queries; what is fused and beyond the class is left out whole."""
    tiny_model(model_type).save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / FILE)
    model = next(model.format(i) for i in range(9) if any(n.startswith(f"{model.format(i)}self_attn.") for n in stored))
    source = edit(tmp_path / "source", beyond(name, model), mtp_num_hidden_layers=1)
    run(source, tmp_path / "out", kv_heads=1, method="mean")
    tensors, config = load_file(tmp_path / "out" / FILE), json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [one for one in tensors if one.startswith(name)]
    if model_type == "phi3":
        assert not kept and config["mtp_num_hidden_layers"] == 0
    else:
        assert kept and config["mtp_num_hidden_layers"] == 1
        for part in ("q", "k", "v", "o"):
            shapes = {tensors[f"{where}self_attn.{part}_proj.weight"].shape for where in (name, model)}
            assert len(shapes) == 1


def test_what_changes_no_heads_passes_everything_on(tmp_path: Path) -> None:
    source = edit(save_tiny(tmp_path / "source", tokenizer=False), beyond("mtp.layers.0."), num_nextn_predict_layers=1)
    notes = run(source, tmp_path / "out", kv_heads=4, method="mean")
    assert load_file(tmp_path / "out" / FILE).keys() == load_file(source / FILE).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert len([note for note in notes if "passed on" in note]) == 1


def test_an_encoder_that_keeps_its_heads_keeps_what_is_like_it(tmp_path: Path) -> None:
    """T5's decoder is grouped and its encoder is not, so a spare encoder block stays as it is, and a decoder block does not."""
    tiny_model("t5").save_pretrained(tmp_path / "source")

    def spare(tensors: Tensors) -> Tensors:
        blocks = [(name, side) for side in ("encoder", "decoder") for name in tensors if name.startswith(f"{side}.block.1.")]
        return {name.replace("block.1.", "block.7."): tensors[name].clone() for name, _ in blocks}

    source = edit(tmp_path / "source", spare)
    run(source, tmp_path / "out")
    old, new = load_file(source / FILE), load_file(tmp_path / "out" / FILE)
    name = "coder.block.7.layer.0.SelfAttention.k.weight"
    assert torch.equal(new["en" + name], old["en" + name])
    assert new["de" + name].shape == new[f"de{name.replace('7', '1')}"].shape != old["de" + name].shape


def test_what_is_stored_head_by_head_has_the_rows_of_its_parts() -> None:
    """Of 5 query and 3 key/value heads of 7, with values of 9: each part alone, gated queries, and what families fuse."""
    layer: Any = SimpleNamespace(geometry=Geometry(5, 3, 7, 9))
    q, k, v, o = 35, 21, 27, 45
    assert _widths(layer) == {q, k, v, o, q + q, k + v, q + k + v, q + k + v + o}


def test_counts_of_prediction_layers_become_none() -> None:
    told = {"num_nextn_predict_layers": 1, "use_mtp": True, "mtp_loss_weight": 0.3, "text_config": {"mtp_num_hidden_layers": 2}}
    assert without_prediction(told) == {
        "num_nextn_predict_layers": 0,
        "use_mtp": False,
        "mtp_loss_weight": 0.3,
        "text_config": {"mtp_num_hidden_layers": 0},
    }
    assert without_prediction({"num_hidden_layers": 2}) == {"num_hidden_layers": 2}


def test_many_names_are_told_as_few() -> None:
    assert patterns([f"layers.{i}.a" for i in range(40)] + ["b.7.c"]) == {"layers.*.a": 40, "b.7.c": 1}
    shown = [f"{letter}.weight" for letter in "abcd"]
    for count in (1, 2, 3):
        assert _many(shown[:count]) == ", ".join(shown[:count])
    assert _many(shown) == "a.weight, b.weight, c.weight and others, 4 in all"
