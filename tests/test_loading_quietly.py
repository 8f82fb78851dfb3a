"""A folder of ours is loaded by transformers without a warning and without a question, also where nobody could answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upfit import api
from upfit.demo import embedded_model

# With upfit imported no code of the folder runs; without it, as on another machine, `trust_remote_code` runs it.
CODE = """
import logging, sys, warnings
warnings.simplefilter("error")
folder, alone = sys.argv[1], sys.argv[2] == "alone"
more = {"trust_remote_code": True} if alone else {}
if alone:
    sys.modules["upfit"] = None
else:
    import upfit
import transformers
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
transformers.utils.logging.set_verbosity_warning()
transformers.utils.logging.add_handler(Keep())
transformers.utils.logging.disable_progress_bar()
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
AutoConfig.from_pretrained(folder, **more)
tokenizer = AutoTokenizer.from_pretrained(folder, **more)
model = AutoModelForCausalLM.from_pretrained(folder, **more)
model.generate(**tokenizer("def f(x):", return_tensors="pt"), max_new_tokens=2, do_sample=False)
print(*said, sep="\\n")
"""
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"kv_heads": 2, "method": "mean"},
    "diff": {"variant": "v2"},
    "cope": {"gates": "constant"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quiet")
    for name, options in KINDS.items():
        api.convert(embedded_model(), place / name, to=name, verify=False, progress=False, **options)
        bare = place / f"{name}-bare"  # whose tokenizer does not say its class, so that the config's decides
        bare.mkdir()
        for path in (place / name).iterdir():
            (bare / path.name).write_bytes(path.read_bytes())
        settings = json.loads((bare / "tokenizer_config.json").read_text())
        settings.pop("tokenizer_class", None)
        (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("how", ["upfit", "alone"])
@pytest.mark.parametrize("name", [*KINDS, *(f"{name}-bare" for name in KINDS)])
def test_nothing_is_said_and_nothing_is_asked(folders: Path, name: str, how: str) -> None:
    command = [sys.executable, "-c", CODE, str(folders / name), how]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "" and done.stderr.strip() == ""
