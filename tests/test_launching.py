"""The files in examples/ that start runs, as far as one machine without a GPU can tell: they are read, and do what they say.

That two nodes find each other is in test_uptrain_resume.py.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from typer.main import get_command

from upfit.cli import app

EXAMPLES = Path(__file__).parent.parent / "examples"
SBATCH = EXAMPLES / "slurm.sbatch"
# What SkyPilot's reference lists, of the fields in use here.
SKY_FIELDS = {"name", "num_nodes", "resources", "volumes", "envs", "setup", "run"}
SKY_RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery"}


@pytest.mark.parametrize(
    "name,processes,shards", [("one-gpu", 1, None), ("fsdp-8-gpus", 8, (None, None)), ("hsdp-2-nodes", 16, ("2", "8"))]
)
def test_accelerate_reads_its_configs(name: str, processes: int, shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    words = ["--config_file", str(EXAMPLES / "accelerate" / f"{name}.yaml"), "--main_process_ip", "localhost"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "-m", "upfit", "uptrain"]))
    assert (args.num_processes, args.mixed_precision, args.use_fsdp) == (processes, "no", shards is not None)
    if shards is not None:
        told = prepare_multi_gpu_env(args)
        assert (told["ACCELERATE_USE_FSDP"], told["FSDP_VERSION"]) == ("true", "2")
        assert (told.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE"), told.get("PARALLELISM_CONFIG_DP_SHARD_SIZE")) == shards


def known_flags() -> set[str]:
    uptrain: Any = get_command(app).commands["uptrain"]  # type: ignore[attr-defined]
    return {name for parameter in uptrain.params for name in (*parameter.opts, *parameter.secondary_opts)}


def words_of(script: str) -> tuple[list[str], list[str]]:
    """Of the torchrun command in `script`: torchrun's words, and those of `upfit uptrain`."""
    text = re.sub(r'\$\((?:[^()]|\([^()]*\))*\)(?=:29500")', "HEAD", script.replace("\\\n", " "))
    words = shlex.split(
        next(line for line in text.splitlines() if "torchrun --nnodes" in re.sub(" +", " ", line)).split("||")[0]
    )
    words = words[words.index("torchrun") + 1 :]
    at = words.index("-m")
    assert words[at : at + 3] == ["-m", "upfit", "uptrain"]
    return words[:at], words[at + 3 :]


@pytest.mark.parametrize("path", [SBATCH, EXAMPLES / "skypilot.yaml"], ids=lambda path: path.name)
def test_torchrun_knows_its_flags_and_upfit_its_own(path: Path) -> None:
    from torch.distributed.run import get_args_parser

    script = path.read_text() if path == SBATCH else yaml.safe_load(path.read_text())["run"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    theirs, ours = words_of(script)
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert {word for word in theirs if word.startswith("--")} <= known
    flags = {word for word in ours if word.startswith("--")}
    assert "--resume" in flags and flags <= known_flags()


def test_skypilot_has_the_fields_it_needs() -> None:
    told = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert set(told) == SKY_FIELDS and set(told["resources"]) == SKY_RESOURCES
    assert all(f"${name}" in told["run"] for name in ("MODEL", "DATA", "OUT", "TOKENS")) and told["envs"]["MODEL"] is None


def test_the_job_asks_slurm_for_what_its_script_counts_on() -> None:
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SBATCH.read_text(), re.MULTILINE))
    assert header["ntasks-per-node"] == "1" and "requeue" in header and header["signal"] == "USR1@180"
    timeout = re.search(r"SHUTDOWN_TIMEOUT=(\d+)", SBATCH.read_text())
    assert timeout is not None and int(timeout[1]) < int(header["signal"].split("@")[1])


@pytest.mark.parametrize(
    "leaves,code,requeued",
    [("mkdir -p $OUT", 0, False), ("touch $OUT.upfit-work/stopped; false", 0, True), ("false", 1, False)],
)
def test_the_job_follows_itself_after_a_clean_stop_only(tmp_path: Path, leaves: str, code: int, requeued: bool) -> None:
    out, asked = tmp_path / "out", tmp_path / "asked"
    (tmp_path / "out.upfit-work").mkdir()
    (tmp_path / "out.upfit-work" / "stopped").touch()  # of the job before
    stands_in = {"srun": leaves, "scontrol": f'if [ $1 = requeue ]; then echo $2 > {asked}; else echo "n1\nn2"; fi'}
    for name, script in stands_in.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "OUT": str(out)}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "MODEL": "m", "DATA": "d", "TOKENS": "1M"}
    assert subprocess.run(["bash", str(SBATCH)], env=environment).returncode == code
    assert asked.exists() == requeued
