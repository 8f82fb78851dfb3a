"""Which model types decode with contextual positions: tiny models of all types, one token at a time against the full forward.

    python -m benchmarks.cope_families [--results benchmarks/results/NAME.json]

For each type and kind of gates that look at the text: converted, given random embeddings, and run over 24 random tokens in
float32, whole and with a cache (14 tokens at once, then one by one). Told are the largest difference of logits over the largest
logit, or why there is none; `stock` is that of the source itself, which some types do not bring down to rounding either.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.folders import letter_tokenizer
from tests.tiny import BUILDABLE, UNGROUPABLE, tiny_model
from upfit.architecture.forwards import cache_name, cache_of
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.environment import environment
from upfit.errors import UpfitError
from upfit.output import Output

TEXT = "\n\n".join(f"the {n} of {n * n} is here and there; return {n};" for n in range(400))
ROUNDING = 1e-3  # of the largest logit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    rows = []
    for model_type in BUILDABLE:
        if model_type not in UNGROUPABLE:
            with tempfile.TemporaryDirectory() as place:
                rows.append({"type": model_type, **tried(model_type, Path(place))})
            print(json.dumps(rows[-1]), flush=True)
    counts = {
        gates: sum(isinstance(row[gates], float) and row[gates] < ROUNDING for row in rows) for gates in ("content", "keys")
    }
    print(counts)
    if args.results:
        told = {"types": len(rows), "decode": counts, "rows": rows, "environment": environment()}
        args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def tried(model_type: str, place: Path) -> dict[str, Any]:
    """`stock`, `content` and `keys`: an error as a number, or a reason."""
    source = place / "source"
    tiny_model(model_type).save_pretrained(source)
    letter_tokenizer().save_pretrained(source)
    (place / "text.txt").write_text(TEXT)
    recipe, told = find_recipes()["cope"], {"stock": error_of(source)}
    text = {"calibration": [str(place / "text.txt")], "calibration_tokens": "512", "calibration_length": 64}
    for gates in ("content", "keys"):
        options = recipe.options(gates=gates, positions=6, span=20, **text)
        try:
            convert(recipe, str(source), place / gates, options, Settings(verify=False), Output(quiet=True))
        except UpfitError as error:
            told[gates] = str(error)
        else:
            told[gates] = error_of(place / gates)
    return told


@torch.no_grad()
def error_of(folder: Path) -> float | str:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 24))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("cope_embeddings"):
                parameter.normal_(0, 0.5)
        full = model(ids, use_cache=False).logits
        cache, parts = None, []
        for start, stop in ((0, 14), *((n, n + 1) for n in range(14, 24))):
            made = model(ids[:, start:stop], use_cache=True, **{cache_name(model.forward): cache})
            cache = cache_of(made)
            parts.append(made.logits)
    except Exception as error:  # a family may want what a text does not give
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return float((torch.cat(parts, 1) - full).abs().max() / full.abs().max())


if __name__ == "__main__":
    main()
