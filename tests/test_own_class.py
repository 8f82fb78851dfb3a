"""What our class for families without grouped heads of their own must keep: generation, padding, gradients, and a cache that is
really smaller. That its logits are right, and how it is written and read, is in the laws of every type."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EncoderDecoderCache, GenerationMixin

from tests.test_laws import sample
from tests.tiny import BUILDABLE, auto_class, tiny_inputs, tiny_model
from upfit.architecture.forwards import cache_of
from upfit.architecture.layers import bind
from upfit.architecture.table import MODEL_TYPE, table
from upfit.checkpoint.reader import open_checkpoint
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import get_recipe
from upfit.modeling.modeling_upfit_gqa import Copies
from upfit.output import Output

OWN = [name for name, entry in table().entries.items() if entry.own]
GROUPS = 2
CLOSE = 1e-4  # float32, through different kernels and shapes
FEW = ("t5", "whisper", "bloom", "gpt2")  # each way of `code` and `fused`
STOCK_IGNORES_PADDING = ("trocr",)  # its positions count padding on the left


@dataclass(frozen=True)
class Pair:
    """A model with four key/value heads, the grouped one made of it with two, in `folder`, and inputs of both."""

    source: Any
    grouped: Any
    inputs: dict[str, Tensor]
    folder: Path

    def load(self, **settings: Any) -> Any:
        return auto_class(self.source.config.model_type).from_pretrained(self.folder, **settings)


@pytest.fixture(scope="module", params=[sample(name) for name in OWN if name in BUILDABLE])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    scratch, source = tmp_path_factory.mktemp(request.param), tiny_model(request.param)
    source.save_pretrained(scratch / "source")
    group(scratch / "source", scratch / "grouped")
    grouped = auto_class(request.param).from_pretrained(scratch / "grouped").eval()
    return Pair(source, grouped, tiny_inputs(source), scratch / "grouped")


def group(source: Path, out: Path) -> None:
    recipe = get_recipe("gqa")
    convert(
        recipe,
        str(source),
        out,
        recipe.options(kv_heads=4 // GROUPS, method="mean"),
        Settings(verify=False),
        Output(quiet=True),
    )


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Six tokens, greedy. Not the family's own `generate`, which may want more than tokens."""
    begin = {"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {}
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    told = {"use_cache": True, "return_dict_in_generate": True, "output_logits": True} | settings
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    plain: Any = GenerationMixin.generate
    return plain(model, **given, **begin, **length, **told)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=CLOSE, rtol=CLOSE)


def cache_bytes(cache: Any) -> list[int]:
    """Of each cache (self-attention, cross-attention), the bytes that its tensors hold in memory."""
    both = isinstance(cache, EncoderDecoderCache)
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if both else [cache]
    kept = [[tensor for layer in one.layers for tensor in (layer.keys, layer.values)] for one in caches]
    return [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in kept]


def test_cache_is_no_cache_and_smaller(pair: Pair) -> None:
    with_cache, without = generate(pair.grouped, pair.inputs), generate(pair.grouped, pair.inputs, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for found, expected in zip(with_cache.logits, without.logits, strict=True):
        assert close(found, expected)
    before = cache_bytes(cache_of(generate(pair.source, pair.inputs)))
    assert [GROUPS * size for size in cache_bytes(cache_of(with_cache))] == before


def test_padding_is_not_seen(pair: Pair) -> None:
    """A short row beside a longer one gets the logits that it gets alone."""
    model, model_type = pair.grouped, pair.source.config.model_type
    if "input_ids" not in pair.inputs or model_type in STOCK_IGNORES_PADDING:
        pytest.skip("it takes no padded tokens")
    ids, pad, after = pair.inputs["input_ids"], 5, model.config.is_encoder_decoder
    filled = [torch.zeros(1, pad, dtype=torch.long), ids[:1, pad:]]
    ones = [torch.zeros(1, pad, dtype=torch.long), torch.ones_like(ids[:1, pad:])]
    rows = torch.cat([torch.cat(filled[::-1] if after else filled, 1), ids[1:]])
    mask = torch.cat([torch.cat(ones[::-1] if after else ones, 1), torch.ones_like(ids[1:])])
    beside, alone = generate(model, {"input_ids": rows, "attention_mask": mask}), generate(model, {"input_ids": ids[:1, pad:]})
    for found, expected in zip(beside.logits, alone.logits, strict=True):
        assert close(found[:1], expected)


@pytest.mark.parametrize("pair", [sample(name) for name in FEW], indirect=True)
def test_eager_is_sdpa(pair: Pair) -> None:
    if not pair.source._supports_sdpa:
        pytest.skip("the family has no sdpa")
    with torch.no_grad():
        found = [pair.load(attn_implementation=name).eval()(**pair.inputs).logits for name in ("eager", "sdpa")]
    assert close(*found)


@pytest.mark.parametrize("pair", [sample(name) for name in FEW], indirect=True)
def test_checkpointed_gradients_are_the_gradients(pair: Pair) -> None:
    labels = pair.inputs.get("decoder_input_ids", pair.inputs.get("input_ids"))
    found = []
    for checkpointing in (False, True):
        model = pair.load().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # of dropout
        model(**pair.inputs, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(close(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("fused", ["", "model", "group"])
def test_what_heads_share_is_given_out_as_often_as_it_is_shared(fused: str) -> None:
    """Of 3 key/value heads of width 5 for 6 query heads; fused with the queries as a whole, or group by group."""
    copies, kv_heads, times, width = Copies(), 3, 2, 5
    copies.kv_heads, copies.times, copies.fused = kv_heads, times, fused
    q, k, v = (torch.randn(2, 4, heads, width) for heads in (kv_heads * times, kv_heads, kv_heads))
    shared = [heads[:, :, [head // times for head in range(kv_heads * times)]] for heads in (k, v)]
    if not fused:
        given, wanted = k, shared[0].flatten(2)
    elif fused == "model":
        given, wanted = torch.cat([q, k, v], 2), torch.cat([q, *shared], 2).flatten(2)
    else:
        groups = [torch.cat([q[:, :, 2 * head : 2 * head + 2], k[:, :, [head]], v[:, :, [head]]], 2) for head in range(3)]
        given, wanted = torch.cat(groups, 2), torch.stack([q, *shared], 3).flatten(2)
    assert torch.equal(copies.spread(given.flatten(2)), wanted)


@pytest.mark.parametrize("model_type", ["t5", "whisper", "bloom", "llama"])
def test_only_what_gets_fewer_heads_becomes_our_class(model_type: str, tmp_path: Path) -> None:
    """A config that changes nothing is the source's; repeated heads need no class of ours where there is a number for them."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        architecture = bind(checkpoint.config, checkpoint.tensors)
    own, heads = architecture.entry.own != "", architecture.kv_heads
    assert own == (model_type != "llama")
    types = [architecture.with_kv_heads(count)["model_type"] for count in (1, heads, 2 * heads)]
    assert types == [MODEL_TYPE if own else model_type, model_type, model_type]
    same = architecture.with_kv_heads(heads)
    assert same == architecture.config and same is not architecture.config
    if not own:
        assert [architecture.with_kv_heads(count)["num_key_value_heads"] for count in (1, 2 * heads)] == [1, 2 * heads]


def test_it_loads_where_upfit_is_not(tmp_path: Path) -> None:
    """The folder brings its code; what that saves brings it too."""
    tiny_model("t5").save_pretrained(tmp_path / "source")
    group(tmp_path / "source", tmp_path / "grouped")
    code = f"""
import sys
sys.modules["upfit"] = None
from transformers import AutoModel, AutoModelForSeq2SeqLM
folder = {str(tmp_path / "grouped")!r}
model, told = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert type(model).__name__ == "UpfitGqaForSeq2SeqLM" and not any(told.values()), (type(model), told)
model.save_pretrained({str(tmp_path / "saved")!r})
model = AutoModel.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(model).__name__ == "UpfitGqaModel" and model.decoder.block[1].layer[1].EncDecAttention.k.out_features == 16
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
