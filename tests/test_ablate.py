"""A model without what a conversion added is the model that it was made from."""

from pathlib import Path

import pytest
import torch

from tests.records import evaluate
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.demo import embedded_model
from upfit.errors import UpfitError
from upfit.evaluate.ablate import ablated
from upfit.evaluate.load import load_model
from upfit.evaluate.options import Options
from upfit.output import Output

QUIET = Output(quiet=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with contextual positions that do something."""
    place = tmp_path_factory.mktemp("cope")
    recipe = find_recipes()["cope"]
    options = recipe.options(gates="constant", positions=8)
    convert(recipe, str(embedded_model()), place / "begun", options, Settings(verify=False), QUIET)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "begun")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cope_embeddings"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    model.save_pretrained(place / "learned")
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(place / "learned")
    return place / "learned"


@pytest.mark.slow
def test_without_its_positions_it_is_the_source(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(against=str(embedded_model()), ablate="cope", windows=4, length=64, dtype="float32")
    told = evaluate(str(learned), options, QUIET)
    lost, gained = told["ablation"]["nats_per_token"]["mean"], told["difference"]["nats_per_token"]["mean"]
    assert abs(gained) > 1e-3 and lost == pytest.approx(-gained, abs=1e-6)
    assert told["ablation"]["part"] == "cope"


def test_the_weights_come_back(learned: Path) -> None:
    from upfit.checkpoint.source import find_source

    model = load_model(find_source(str(learned)), "float32", torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError), ablated(model, "cope", "it"):
        assert not model.get_parameter("model.layers.0.self_attn.cope_embeddings").any()
        raise RuntimeError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_part_that_is_not_there_is_told(learned: Path) -> None:
    for model, message in ((learned, "it has cope"), (embedded_model(), "it has none")):
        with pytest.raises(UpfitError, match=message):
            evaluate(str(model), Options(ablate="heads", windows=4, length=64), QUIET)
