"""Which stages an uptraining has where nobody names any, by how the conversion left the model."""

from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_tiny, tiny_llama
from tests.uptraining import QUIET, Workshop, config, make_workshop, pooled, text
from upfit import provenance
from upfit.checkpoint.source import Source
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.uptrain.config import resolve
from upfit.uptrain.default_stages import default_stages


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.parametrize(
    ("measured", "stages"),
    [({"leaves": "blind"}, "layerwise=35%,lm"), ({"leaves": "fitted"}, "lm"), ({"leaves": "lossless", "lossless": True}, "lm")]
    + [({"leaves": "unsettled", "lossless": True}, None), ({"leaves": "<b>"}, None), ({"leaves": None}, None)],
)
def test_any_recipe_says_how_it_leaves_a_model(
    measured: dict[str, Any], stages: str | None, shop: Workshop, tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", pooled(tiny_llama()))
    source = provenance.read(shop.student)[0]["source"]
    provenance.write(student, [provenance.step("convert made-up", source, {}, measured)])
    assert default_stages(config(), Source(student, "student"), False) == stages
    (tmp_path / "said.toml").write_text("kl_weight = 1.0\nce_weight = 0.0\ntemperature = 1.0\n")
    said = resolve(tmp_path / "said.toml", {})
    assert default_stages(said, Source(student, "student"), False) == stages, "who says what is so anyway has said nothing"


@pytest.mark.slow
def test_heads_merged_blindly_have_their_attention_repaired_first(shop: Workshop, tmp_path: Path) -> None:
    """Right after such a conversion, and only where the teacher's attention can be set beside the model's."""
    student = save_tiny(tmp_path / "student", pooled(tiny_llama()))
    told, source = provenance.read(shop.student)[0]["source"], Source(student, "student")

    def after(method: str | None, sharded: bool = False, ran: dict[str, Any] | None = None, **changes: Any) -> str | None:
        provenance.write(student, [provenance.step("convert gqa", told, {"kv_heads": 2, "method": method}, ran)])
        return default_stages(config(**changes), source, sharded)

    assert after("mean") == "layerwise=35%,lm" and after("aligned") == after("mean", sharded=True) == "lm"
    assert after("mean", ce_weight=0.5) == "layerwise=35%,distill" and after("aligned", teacher=str(shop.teacher)) == "distill"
    assert [after("mean", **one) for one in ({"stages": "distill"}, {"teacher": "none"}, {"kl_weight": 0.0})] == [None] * 3
    assert after(None) is None
    assert after("auto", ran={"method_ran": "mean"}) == after("mean") and after("auto", ran={"method_ran": "aligned"}) == "lm"
    assert after("auto", ran={"not_aligned": "why"}) == after("mean") and after("auto", ran={"calibration": {}}) == "lm"
    after("aligned")
    provenance.append(student, provenance.step("evaluate", {}, {}))
    assert default_stages(config(), source, False) == "lm", "to be measured changes nothing"
    after("mean")
    report = Workshop(shop.teacher, student, shop.data).run(tmp_path / "out", tokens="512")
    assert [stage.stage for stage in report.stages or []] == ["layerwise", "lm"]
    assert 'stages = "layerwise=35%,lm"' in (tmp_path / "out" / "uptrain.toml").read_text()
    assert default_stages(config(), Source(tmp_path / "out", "out"), False) is None, "it has been uptrained since"


@pytest.mark.slow
def test_after_the_default_conversion_an_aligned_model_is_changed_with_care(shop: Workshop, tmp_path: Path) -> None:
    """Whatever was asked for: it is what ran that sets the stages and the learning rate."""
    (tmp_path / "a.txt").write_text("\n".join(text(seed) for seed in range(20)))
    recipe, small = find_recipes()["gqa"], tmp_path / "small"
    chosen = recipe.options(kv_heads=2, calibration=[str(tmp_path / "a.txt")], calibration_tokens="1k", calibration_length=64)
    convert(recipe, str(shop.teacher), small, chosen, Settings(verify=False), QUIET)
    assert provenance.read(small)[-1]["options"]["method"] == "auto"
    report = Workshop(shop.teacher, small, shop.data).run(tmp_path / "out", tokens="256", learning_rate=None)
    resolved = provenance.read(tmp_path / "out")[-1]["options"]["resolved"]
    assert report.stage == "lm" and resolved["peak_learning_rate"] == pytest.approx(0.2 * 0.2 / 32)


@pytest.mark.slow
def test_a_conversion_that_lost_nothing_learns_from_the_text(shop: Workshop, tmp_path: Path) -> None:
    """From what it was it could learn nothing but rounding."""

    def after(**options: Any) -> str | None:
        recipe, out = find_recipes()["cope"], tmp_path / f"cope-{len(list(tmp_path.iterdir()))}"
        chosen = recipe.options(gates="constant", positions=6, **options)
        convert(recipe, str(shop.teacher), out, chosen, Settings(verify=False), QUIET)
        assert provenance.read(out)[-1]["measurements"]["lossless"]
        return default_stages(config(), Source(out, "out"), False)

    assert after() == "lm" and after(drop_rope=True) is None
    rounded = tmp_path / "rounded"
    chosen = find_recipes()["cope"].options(gates="constant", positions=6)
    convert(find_recipes()["cope"], str(shop.teacher), rounded, chosen, Settings(verify=True, dtype="bfloat16"), QUIET)
    assert default_stages(config(), Source(rounded, "rounded"), False) == "lm", "rounding is nothing to learn from"
    assert default_stages(config(teacher=str(shop.teacher)), Source(tmp_path / "cope-0", "out"), False) == "distill"
    report = Workshop(shop.teacher, tmp_path / "cope-0", shop.data).run(tmp_path / "out", tokens="512", learning_rate=None)
    assert report.stage == "lm" and report.holdout["after"]["ce"] < report.holdout["before"]["ce"]
    resolved = provenance.read(tmp_path / "out")[-1]["options"]["resolved"]
    assert resolved["peak_learning_rate"] == pytest.approx(0.2 * 0.2 / 32)


@pytest.mark.slow
def test_lm_learns_without_a_teacher(shop: Workshop, tmp_path: Path) -> None:
    report = shop.run(tmp_path / "out", stages="lm", tokens="512")
    assert report.stage == "lm" and report.holdout["after"]["kl"] == 0
    assert provenance.read(tmp_path / "out")[-1]["teacher"] is None
