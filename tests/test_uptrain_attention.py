"""Uptraining of converted attentions: rates of their own, no decay, progress, and what is told of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.uptraining import QUIET, Workshop, config, make_workshop, metrics
from upfit.convert.conversion import Settings, convert, merge
from upfit.convert.diff.recipe import Options
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.uptrain.model import converted_modules
from upfit.uptrain.model.model_traits import load
from upfit.uptrain.run.run import MEASURE_EVERY
from upfit.uptrain.run.setup import make_optimizer
from upfit.uptrain.train import uptrain


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def differential(workshop: Workshop, folder: Path, **options: Any) -> Path:
    convert(find_recipes()["diff"], str(workshop.teacher), folder, Options(**options), Settings(verify=False), QUIET)
    return folder


def test_rates_and_decay(workshop: Workshop, tmp_path: Path) -> None:
    model = load(differential(workshop, tmp_path / "v2"), torch.float32, torch.device("cpu"))
    optimizer = make_optimizer(model, config(added_rate=3.0, query_rate=0.25, weight_decay=0.1))
    told = {id(p): (group["scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = (1.0, 0.1)
        if "lambda_proj" in name:
            expected = (3.0, 0.0)
        elif "q_proj" in name:
            expected = (0.25, 0.1)
        elif parameter.ndim < 2 or "embed" in name:
            expected = (1.0, 0.0)
        assert told[id(parameter)] == expected, name


def test_the_embeddings_of_positions_learn_ten_times_as_fast(workshop: Workshop, tmp_path: Path) -> None:
    options = {"positions": 6, "span": 20, "gates": "constant"}
    recipe = find_recipes()["cope"]
    convert(recipe, str(workshop.teacher), tmp_path / "cope", recipe.options(**options), Settings(verify=False), QUIET)
    model = load(tmp_path / "cope", torch.float32, torch.device("cpu"))
    optimizer = make_optimizer(model, config(added_rate=3.0))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    added = {name.rpartition(".")[2]: scales[id(p)] for name, p in model.named_parameters() if "cope" in name}
    assert added == {"cope_embeddings": 30.0, "cope_gate_bias": 3.0}


def test_progress_goes_from_0_to_1(workshop: Workshop, tmp_path: Path) -> None:
    model = load(differential(workshop, tmp_path / "dex", variant="dex"), torch.float32, torch.device("cpu"))
    modules = list(converted_modules.converted(model))
    assert len(modules) == model.config.num_hidden_layers and all(module.progress == 1.0 for module in modules)
    for step, expected in ((0, 0.0), (10, 0.5), (20, 1.0), (39, 1.0)):
        converted_modules.set_progress(model, step, 40)
        assert all(module.progress == expected for module in modules)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lambdas": "head"}, {"variant": "dex"}, {"variant": "split", "naive": True}])
def test_a_run_trains_and_tells(workshop: Workshop, tmp_path: Path, options: dict[str, Any]) -> None:
    """λ moves, is told for each layer, the result has the modelling file, and it merges into a stock class."""
    start = differential(workshop, tmp_path / "start", **options)
    settings = config(kl_weight=0.0, ce_weight=1.0)
    uptrain(str(start), str(workshop.data), tmp_path / "out", settings, False, False, QUIET)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name in moved for name in before if "lambda" in name or "dex_weight" in name)
    assert not any("split_scale" in name or "dex_heads" in name for name in moved)
    told = [line for line in metrics(tmp_path / "out") if "lambda" in line]
    assert told[-1]["step"] == metrics(tmp_path / "out")[-1]["step"] and len(told[-1]["lambda"]) == 2
    assert all(line["step"] % MEASURE_EVERY == 0 for line in told[:-1]), "the end alone is measured out of turn"
    assert ("cosine" in told[-1]) == (options.get("lambdas") == "head")
    assert (tmp_path / "out" / "modeling_upfit_diff.py").exists()
    if "naive" in options:
        with pytest.raises(UpfitError, match="rotated pairs"):
            merge(str(tmp_path / "out"), tmp_path / "plain", Settings(), QUIET)
        return
    merge(str(tmp_path / "out"), tmp_path / "plain", Settings(), QUIET)
    assert not (tmp_path / "plain" / "modeling_upfit_diff.py").exists()
