"""Our model types: known to transformers where upfit is imported, whatever is imported first, and at no cost before."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.output import Output


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import upfit; from transformers import AutoConfig",
        "from transformers import AutoConfig; import upfit",
        pytest.param("import upfit; from transformers import PreTrainedModel, AutoConfig", marks=pytest.mark.slow),
        pytest.param(
            "import upfit; import transformers.quantizers; from transformers import AutoConfig", marks=pytest.mark.slow
        ),
    ],
)
def test_any_order_of_imports_does(tmp_path: Path, imports: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    recipe = find_recipes()["diff"]
    convert(recipe, str(tmp_path / "source"), tmp_path / "out", recipe.options(), Settings(verify=False), Output(quiet=True))
    code = f"""
{imports}
config = AutoConfig.from_pretrained({str(tmp_path / "out")!r})
assert type(config).__name__ == "UpfitDiffConfig" and config.model_type == "llama", config
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "UpfitDiffForCausalLM"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_import_is_light() -> None:
    code = "import upfit, sys; assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [("bloom", "gqa", {"kv_heads": 2, "method": "mean"}), ("gpt_neo", "gqa", {"kv_heads": 2, "method": "mean"})]
    + [
        ("llama", "diff", {"variant": variant, **more})
        for variant, more in (("v2", {}), ("dex", {}), ("split", {"naive": True}))
    ]
    + [("llama", "cope", {"gates": "constant"})],
)
def test_modules_of_one_stock_class_have_one_class(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """torch.compile compiles anew for each class."""
    tiny_model(family).save_pretrained(tmp_path / "source")
    recipe = find_recipes()[name]
    settings = Settings(verify=False)
    convert(recipe, str(tmp_path / "source"), tmp_path / "out", recipe.options(**options), settings, Output(quiet=True))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "out") for _ in range(2)]
    ours = [type(module) for model in models for module in model.modules() if hasattr(module, "stock_module")]
    names = {kind.__name__ for kind in ours}
    assert len(ours) >= 4 and len(set(ours)) == len(names)
