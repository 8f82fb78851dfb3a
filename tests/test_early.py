"""What a command cannot do anything with is one line, told before torch is imported: of every verb."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from upfit.cli import app
from upfit.demo import embedded_model

ROOT = Path(__file__).parent.parent
MODEL = str(embedded_model())
NO_MODEL = "no model folder at ./nope; give an existing folder"
NO_COUNT = "got 'x'; give a positive number such as 50000"
TAKEN = "exists and is not empty; choose another folder or pass --overwrite"
IMPORTED = {"torch", "transformers", "accelerate", "scipy", "matplotlib"}

LINES = {  # words of a command line -> what its line says
    "show ./nope": NO_MODEL,
    "show t.txt": "t.txt is a file; give the model's folder or a hub id",
    "show bare": "config.json",
    "show odd": "cannot be converted",
    "merge latent out": "cannot be converted: it uses multi-head latent attention",
    "merge ./nope out": NO_MODEL,
    "merge MODEL full": TAKEN,
    "merge MODEL out --dtype int3": "--dtype 'int3' is not known",
    "calibrate ./nope t.txt s.safetensors": NO_MODEL,
    "calibrate MODEL ./nope s.safetensors": "--calibration ./nope is not here",
    "calibrate MODEL t.txt s.safetensors --field body": "--field body is for .jsonl",
    "calibrate MODEL t.txt s.bin": "must end in .safetensors",
    "calibrate MODEL t.txt full/s.safetensors": "s.safetensors exists; choose another name or pass --overwrite",
    "calibrate MODEL t.txt s.safetensors --calibration-tokens x": NO_COUNT,
    "prepare ./nope out --tokenizer MODEL": "no file or folder at ./nope",
    "prepare t.txt out --tokenizer ./nope": NO_MODEL,
    "prepare t.txt full --tokenizer MODEL": TAKEN,
    "prepare t.txt out --tokenizer MODEL --tokens x": NO_COUNT,
    "prepare t.txt out --tokenizer MODEL --workers 0": "--workers got 0; it takes 1 or more",
    "synth ./nope out --tokenizer MODEL --items 3": "no file or folder at ./nope",
    "synth t.txt full --tokenizer MODEL --items 3": TAKEN.partition(";")[0],
    "synth t.txt out --tokenizer ./nope --items 3": NO_MODEL,
    "plan ./nope --tokens 1M": NO_MODEL,
    "plan MODEL --tokens x": NO_COUNT,
    "plan MODEL --tokens 1M --gpu g9": "--gpu g9 is not known",
    "plan MODEL": "--tokens",
    "uptrain ./nope d out --tokens 1M": NO_MODEL,
    "uptrain MODEL ./nope out --tokens 1M": "nope has no manifest.json",
    "uptrain MODEL bare out --tokens 1M": "bare TOKENS --tokenizer MODEL",
    "uptrain MODEL bare full --tokens 1M": TAKEN,
    "uptrain MODEL bare out --tokens x": NO_COUNT,
    "uptrain MODEL bare out --tokens 1M --config ./nope": "nope",
    "evaluate ./nope": NO_MODEL,
    "evaluate MODEL --against ./nope": NO_MODEL,
    "evaluate MODEL --data ./nope": "--data ./nope is not here",
    "evaluate MODEL --data t.txt --field body": "--field body is for .jsonl",
    "evaluate MODEL --probe typo": "--probe got 'typo'",
    "report ./nope": NO_MODEL,
    "report MODEL page.pdf": "give a name that ends in .html",
    "report MODEL full/page.html": "page.html exists; choose another name or pass --overwrite",
    "compare MODEL ./nope": NO_MODEL,
    "push ./nope a/b": "give the folder of a converted model",
    "demo full": TAKEN,
    "demo out --tokens x": NO_COUNT,
}
CONVERT = {
    "./nope out": NO_MODEL,
    "MODEL full": TAKEN,
    "latent out": "cannot be converted: it uses multi-head latent attention",
    "MODEL t.txt": "is a file; choose another name",
    "MODEL out --dtype int3": "--dtype 'int3' is not known",
    "MODEL out --max-shard-size big": "--max-shard-size got 'big'",
}
OF_ONE = {
    "gqa MODEL out --kv-heads 2 --method typo": "--method 'typo' is not known",
    "gqa MODEL out --kv-heads 2 --calibration ./nope": "--calibration ./nope is not here",
    "gqa MODEL out --kv-heads 2 --calibration-tokens x": NO_COUNT,
    "gqa MODEL out --kv-heads 2 --calibration s.safetensors --field body": "--field body is for .jsonl",
    "cope MODEL out --positions 1": "--positions got 1; it takes 2 or more",
    "diff MODEL out --variant dex --heads entropy --calibration ./nope": "--calibration ./nope is not here",
    "cope MODEL out --calibration ./nope": "--calibration ./nope is not here",
    "cope MODEL out --gates typo": "--gates 'typo' is not known",
}
NEEDED = {"gqa": " --kv-heads 2"}
ATTENTIONS = list(get_command(app).commands["convert"].commands)  # type: ignore[attr-defined]
ALL = (
    LINES
    | {f"convert {name} {words}{NEEDED.get(name, '')}": line for name in ATTENTIONS for words, line in CONVERT.items()}
    | {f"convert {words}": line for words, line in OF_ONE.items()}
)
FREE = {"list", "env"}  # they take nothing that could be wrong


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, an output that is taken, a folder without a model, and two of types that are refused."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("full", "bare", "odd", "latent"):
        (folder / name).mkdir()
    (folder / "t.txt").write_text("Some words.\n")
    for name in ("s.safetensors", "page.html"):
        (folder / "full" / name).write_text("taken")
    (folder / "odd" / "config.json").write_text('{"model_type": "mamba"}')
    (folder / "latent" / "config.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 8}')
    return folder


def run(words: list[str], folder: Path) -> tuple[int, str, set[str]]:
    """Exit status and stderr of `upfit`, and what of the heavy libraries it has imported."""
    code = (
        "import sys\nimport upfit.cli\ntry:\n    upfit.cli.main()\nfinally:\n"
        f"    print(*({IMPORTED} & set(sys.modules)), file=sys.stdout)"
    )
    command = [sys.executable, "-c", code, *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    return done.returncode, done.stderr, set(done.stdout.split())


@pytest.mark.parametrize(("words", "line"), ALL.items(), ids=ALL)
def test_an_error_path_imports_nothing_heavy(place: Path, words: str, line: str) -> None:
    status, told, heavy = run([MODEL if word == "MODEL" else word for word in words.split()], place)
    assert status == 1 and told.startswith("upfit: ") and told.count("\n") == 1, told
    assert line in told and not heavy


def test_every_verb_is_among_them() -> None:
    verbs = {words.split()[0] for words in ALL}
    assert verbs == set(get_command(app).commands) - FREE  # type: ignore[attr-defined]


def test_a_hub_id_that_the_hub_does_not_give_imports_nothing_heavy(place: Path) -> None:
    status, told, heavy = run(["show", "nobody/nothing"], place)
    assert status == 1 and told.startswith("upfit: no folder nobody/nothing here") and not heavy


def test_flags_that_are_none_import_nothing_heavy(place: Path) -> None:
    status, told, heavy = run(["convert", "mqa", MODEL, "out", "--typo"], place)
    assert status == 2 and "--typo" in told and not heavy


def test_an_attention_that_was_forgotten_is_an_error_of_usage(place: Path) -> None:
    status, told, heavy = run(["convert", "here", "out", "--kv-heads", "2"], place)
    words = " ".join(told.replace("│", " ").split())
    assert status == 2 and not heavy
    assert "got here for an attention; choose one of cope, diff, gqa, mla, mqa, then give SRC and OUT" in words
