"""A stock model with a scaled latent is trained in ordinary numbers, and written as its class wants it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.folders import save_tiny, tiny_llama
from tests.full_rank import own_checkpoint
from tests.test_uptrain_resume import Interrupting, untimed
from tests.uptraining import QUIET, Workshop, make_workshop, metrics, one_thread, weights
from upfit.architecture.latent_fold import FoldedNorm, fold, unfold
from upfit.architecture.latent_scale import LATENT_ERROR, latent_error, mean_square_bound, scale_of
from upfit.convert.conversion import Settings, convert
from upfit.convert.mla.test_deepseek import both
from upfit.convert.mla.test_deepseek_own import own
from upfit.convert.recipe import get_recipe
from upfit.errors import UpfitError
from upfit.uptrain import train
from upfit.uptrain.model.layerwise import Layerwise
from upfit.uptrain.model.model_traits import examine

LATENT, ROTATED, WIDE = 10, 4, (16, 8)
SAME = 1e-5  # of the largest logit: the norm's constant, and float32
GROWS: dict[str, Any] = {"stages": "lm", "tokens": "1024", "learning_rate": 0.3, "clip": 1e9}  # latents that leave their scale


@dataclass(frozen=True)
class Shops:
    """The same latents as they are, with zeros beside them, and in bfloat16."""

    plain: Workshop
    padded: Workshop
    rounded: Workshop


def with_latent(shop: Workshop, student: Path, dtype: str | None = None, **changes: Any) -> Workshop:
    """The same with a stock student in a folder that is made of the teacher, on the text beside the tokens."""
    text = {"calibration": [str(shop.data.parent / "text.jsonl")], "calibration_tokens": "1k", "calibration_length": 32}
    recipe = get_recipe("mla")
    options = recipe.options(latent=LATENT, rope_dim=ROTATED, target="deepseek_v3", **text, **changes)
    convert(recipe, str(shop.teacher), student, options, Settings(verify=False, dtype=dtype), QUIET)
    return Workshop(shop.teacher, student, shop.data)


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shops]:
    folder = tmp_path_factory.mktemp("latents")
    with one_thread():
        data = make_workshop(folder).data
        teacher = save_tiny(folder / "source", tiny_llama(num_key_value_heads=2, rms_norm_eps=1e-5))
        shop = Workshop(teacher, teacher, data)
        padded = with_latent(shop, folder / "padded", pad="{}+{}".format(*WIDE))
        yield Shops(with_latent(shop, folder / "plain"), padded, with_latent(shop, folder / "rounded", "bfloat16"))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=SAME * float(expected.abs().max()))


def latents(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each layer the rows of its latent, the weight of the norm behind it, and that of the norm before."""
    for name, norm in state.items():
        if name.endswith("kv_a_layernorm.weight"):
            module, layer = name.removesuffix("kv_a_layernorm.weight"), name.partition("self_attn")[0]
            yield state[f"{module}kv_a_proj_with_mqa.weight"][: len(norm)], norm, state[f"{layer}input_layernorm.weight"]


@pytest.mark.parametrize("name", ["plain", "padded", "rounded"])
def test_taken_off_and_put_on_again_no_bit_changes(shops: Shops, name: str) -> None:
    """Folded, it computes the same with numbers of ordinary size."""
    model = loaded(getattr(shops, name).student)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    fold(model)
    assert sum(isinstance(module, FoldedNorm) for module in model.modules()) == 2
    assert not any("kv_a_layernorm" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    sizes = [[float(rows.abs().max()) for rows, *_ in latents(state)] for state in (before, model.state_dict())]
    assert max(sizes[0]) < 1e-3 and min(sizes[1]) > 0.1
    same(logits(model), expected)
    after = unfold(model, model.state_dict())
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_latent_that_has_grown_gets_a_smaller_scale(shops: Shops) -> None:
    """The largest that keeps the norm a constant; one that has shrunk keeps what it had."""
    model = loaded(shops.plain.student)
    fold(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight[:LATENT] *= 1000
        model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight[:LATENT] /= 1000
    old, after = [scale_of(norm) for _, norm, _ in latents(model.state_dict())], unfold(model, model.state_dict())
    (rows, norm, before), (_, kept_norm, _) = latents(after)
    assert LATENT_ERROR / 4 < latent_error(1.0, mean_square_bound(rows, before)) <= LATENT_ERROR
    assert old[0] / 4096 <= scale_of(norm) <= old[0] / 512 and scale_of(kept_norm) == old[1]
    expected = logits(model)
    stock = loaded(shops.plain.student)
    stock.load_state_dict(after)
    same(logits(stock), expected)


@pytest.mark.parametrize("name", ["plain", "rounded"])
def test_what_is_written_computes_what_was_trained(
    shops: Shops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its weights rounded to the folder's type, by plain transformers; though latents have left the scale that they had."""
    shop, trained, write = getattr(shops, name), list[Tensor](), train.export

    def watched(student: Any, *rest: Any) -> None:
        model = copy.deepcopy(student).eval()
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            for parameter in model.parameters() if name == "rounded" else ():
                parameter.copy_(parameter.bfloat16())
        trained.append(logits(model))
        write(student, *rest)

    monkeypatch.setattr(train, "export", watched)
    shop.run(tmp_path / "out", **GROWS)
    before, after = (load_file(folder / "model.safetensors") for folder in (shop.student, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16 if name == "rounded" else torch.float32}
    scales = [[scale_of(norm) for _, norm, _ in latents(state)] for state in (before, after)]
    assert scales[1][0] < scales[0][0], "else nothing was put to the test"
    same(logits(loaded(tmp_path / "out")), trained[0])
    assert (logits(loaded(shop.student)) - trained[0]).abs().max() > 0.01
    assert (tmp_path / "out" / "config.json").read_bytes() == (shop.student / "config.json").read_bytes()


def test_stopped_and_resumed_it_ends_with_the_same_bytes(shops: Shops, tmp_path: Path) -> None:
    """Also between two stages, of which the first writes a folder of the stock class in float32."""
    settings: dict[str, Any] = {"stages": "layerwise=50%,lm", "tokens": "1024", "save_every": "2", "learning_rate": 1e-4}
    report = shops.rounded.run(tmp_path / "whole", **settings)
    assert shops.rounded.run(tmp_path / "broken", output=Interrupting(3), **settings).stopped
    shops.rounded.run(tmp_path / "broken", resume=True, **settings)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")
    assert (report.stages or [])[0].holdout["before"]["attention_error"] < 0.2, "of outputs that are nearly the teacher's"


def test_zeros_beside_a_latent_stay_zero(shops: Shops, tmp_path: Path) -> None:
    """Each stands before another zero, so no gradient reaches it. The rest begins where it would without them; its queries are
    larger, for the class divides scores by the root of a wider head, and so take other steps."""
    shops.plain.run(tmp_path / "plain", tokens="1024")
    shops.padded.run(tmp_path / "padded", tokens="1024")
    first, last = ([metrics(tmp_path / name)[at]["loss"] for name in ("padded", "plain")] for at in (0, -1))
    assert first[0] == pytest.approx(first[1], rel=1e-6) and last[0] < 0.9 * first[0]
    for name, tensor in load_file(tmp_path / "padded" / "model.safetensors").items():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            assert not tensor[LATENT : WIDE[0]].any() and not tensor[WIDE[0] + ROTATED :].any() and tensor[:LATENT].any()
        if name.endswith("kv_b_proj.weight"):
            assert not tensor[:, LATENT:].any() and tensor[:, :LATENT].any()
        if name.endswith("q_proj.weight"):
            assert not tensor.unflatten(0, (4, -1))[:, -(WIDE[1] - ROTATED) :].any()


CASES = ("llama-tied", "granite", "llama-yarn", "phi3")  # another stream, a factor on branches, another magnitude, some rotated


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_attention_of_full_rank_is_its_teachers_layer_by_layer(case: str, stock: bool) -> None:
    """Whatever its class turns keys by, and what it adds to its stream in which units. What it has lost it learns again."""
    teacher, student = both(case, torch.float32)
    if stock:
        fold(student)
    else:
        student = own(*own_checkpoint(teacher))
    teacher.requires_grad_(False)
    learner = Layerwise(student, teacher, examine(teacher), [f"model.layers.{index}.self_attn" for index in range(2)])
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(2, -1)
    learner.take_units(ids, positions)
    loss, *errors = learner(ids, positions, ids)
    assert max(errors) / ids.numel() < 1e-9
    learned = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in learned} == {"self_attn"}
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.mul_(0.9 if "kv_b_proj" in name else 1)
    before = learner(ids, positions, ids)[0]
    before.backward()
    size = sum(p.grad.square().sum() for p in learned.values() if p.grad is not None)
    with torch.no_grad():
        for parameter in learned.values():
            parameter -= 0.1 * before / size * parameter.grad
    after = learner(ids, positions, ids)[0]
    assert 0.8 * before < after < 0.95 * before, "a tenth of it, as far as it is a plane"


def test_what_no_scale_of_ours_was_put_on_is_refused(shops: Shops, tmp_path: Path) -> None:
    state = load_file(shops.plain.student / "model.safetensors")
    path = "model.layers.1.self_attn."
    norm, large = state[f"{path}kv_a_layernorm.weight"].clone(), state[f"{path}kv_a_proj_with_mqa.weight"] * 2**8
    norm[0] *= 2
    changes = {
        "kv_a_layernorm is no constant": {f"{path}kv_a_layernorm.weight": norm},
        "not below the epsilon": {f"{path}kv_a_proj_with_mqa.weight": large},
        "too small for float16": {name: tensor.half() for name, tensor in state.items()},
    }
    for number, (message, tensors) in enumerate(changes.items()):
        student = tmp_path / f"student-{number}"
        student.mkdir()
        for file in shops.plain.student.iterdir():
            (student / file.name).write_bytes(file.read_bytes())
        save_file({**state, **tensors}, student / "model.safetensors", {"format": "pt"})
        with pytest.raises(UpfitError, match=f"is not trained: .*{message}") as caught:
            Workshop(shops.plain.teacher, student, shops.plain.data).run(tmp_path / "out")
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))
