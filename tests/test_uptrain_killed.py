"""Uptraining that is killed, alone and in several processes, ends as if it had not been."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.test_uptrain_resume import untimed
from tests.uptraining import BASE, Workshop, make_workshop, metrics, one_thread, weights
from tests.warm_python import ENVIRONMENT, shared_python
from upfit.uptrain.run.state import Workspace

DRIVER = """
import gc, json, os, sys
from pathlib import Path
import torch
from torch.distributed import TCPStore
from accelerate import Accelerator
from upfit.output import Output
from upfit.uptrain.config import Config
from upfit.uptrain.train import uptrain
torch.set_num_threads(1)
end = Accelerator.end_training
def checked(accelerator):  # a wrapped model that is still there when the process group ends hangs the process now and then
    assert not [o for o in gc.get_objects() if isinstance(o, torch.nn.parallel.DistributedDataParallel)]
    end(accelerator)
Accelerator.end_training = checked
model, data, out, resume, settings = sys.argv[1:]
Path(out + ".pid" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
report = uptrain(model, data, Path(out), Config(**json.loads(settings)), resume == "resume", False, Output(quiet=True))
print(json.dumps(report.record()))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_thread():
        yield make_workshop(tmp_path_factory.mktemp("shop"))


def driver(tmp_path: Path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


def command(shop: Workshop, tmp_path: Path, out: Path, resume: bool = False, **changes: Any) -> list[str]:
    settings = json.dumps({**BASE, **changes})
    return [str(driver(tmp_path)), str(shop.student), str(shop.data), str(out), "resume" if resume else "new", settings]


@pytest.fixture(scope="module")
def python() -> str:
    return shared_python()


PATIENCE = 300.0  # seconds; a busy machine takes long to import torch
LONG: dict[str, Any] = {"tokens": "12800", "save_every": "10"}


@contextmanager
def running(command: list[str], place: Path, lines: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process once its metrics in `place` have so many lines; it never outlives the block."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline, path = time.monotonic() + PATIENCE, place / "metrics.jsonl"
        while lines and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline, "it did not come so far in time"
            time.sleep(0.005)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(shop: Workshop, python: str, tmp_path: Path) -> None:
    whole = [python, *command(shop, tmp_path, tmp_path / "whole", **LONG)]
    subprocess.run(whole, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    for count, resume in ((15, False), (60, True)):
        broken = [python, *command(shop, tmp_path, tmp_path / "broken", resume, **LONG)]
        with running(broken, tmp_path / "broken.upfit-work", count) as process:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL and not (tmp_path / "broken").exists()
    final = [python, *command(shop, tmp_path, tmp_path / "broken", True, **LONG)]
    subprocess.run(final, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")


def torchrun(python: str, shop: Workshop, tmp_path: Path, out: Path, resume: bool = False, **changes: Any) -> list[str]:
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, *command(shop, tmp_path, out, resume, **changes)]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(shop: Workshop, python: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "batch_tokens": "160",
        "tokens": "1600",
        "micro_batch": 2,
    }  # 5 rows a step: one process has an empty one
    subprocess.run(
        torchrun(python, shop, tmp_path, tmp_path / "two", **settings), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL
    )
    report = shop.run(tmp_path / "one", **settings)
    pairs = zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True)
    for two, one in pairs:
        for name in ("loss", "ce", "kl", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    told = json.loads((tmp_path / "two" / "recipe.json").read_text())["steps"][-1]
    assert told["options"]["resolved"]["processes"] == 2
    assert told["measurements"]["holdout"]["after"]["kl"] == pytest.approx(report.holdout["after"]["kl"], rel=1e-3)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_resumes_bit_exactly(shop: Workshop, python: str, tmp_path: Path) -> None:
    def run(out: str, resume: bool = False) -> None:
        words = torchrun(python, shop, tmp_path, tmp_path / out, resume, **LONG)
        subprocess.run(words, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)

    run("whole")
    with running(torchrun(python, shop, tmp_path, tmp_path / "broken", **LONG), tmp_path / "broken.upfit-work", 13) as process:
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert not (tmp_path / "broken").exists() and not list((tmp_path / "broken.upfit-work").glob("*.tmp"))
    saved = next(Workspace(tmp_path / "broken.upfit-work").checkpoints())
    assert int(saved.name[5:]) == len(metrics(tmp_path / "broken.upfit-work"))
    run("broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_one_process_dies_all_end_and_nothing_is_lost_but_the_last_steps(shop: Workshop, python: str, tmp_path: Path) -> None:
    def run(out: str, resume: bool = False) -> None:
        words = torchrun(python, shop, tmp_path, tmp_path / out, resume, **LONG)
        subprocess.run(words, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)

    run("whole")
    with running(torchrun(python, shop, tmp_path, tmp_path / "broken", **LONG), tmp_path / "broken.upfit-work", 23) as process:
        os.kill(int((tmp_path / "broken.pid1").read_text()), signal.SIGKILL)
        assert process.wait(PATIENCE) == 1
    assert not (tmp_path / "broken").exists()
    saved = next(Workspace(tmp_path / "broken.upfit-work").checkpoints())
    assert int(saved.name[5:]) >= 10, "a checkpoint is due every ten steps, and written while the next ones go on"
    run("broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_find_each_other_and_stop_together(shop: Workshop, python: str, tmp_path: Path) -> None:
    """Two launchers on the loopback device, and USR1 to both, as Slurm sends it (see examples/slurm.sbatch)."""
    # The store outlives both launchers: torch aborts one whose store went with the other.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "is_host=0"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{store.port}"]
    flags += ["--rdzv-id", "7", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    place = tmp_path / "out.upfit-work"
    words = [python, "-m", "torch.distributed.run", *flags, *command(shop, tmp_path, tmp_path / "out", **LONG)]
    with running(words, place, 0) as first, running(words, place, 2) as second:
        for node in (first, second):
            node.send_signal(signal.SIGUSR1)
        assert [node.wait(PATIENCE) for node in (first, second)] == [1, 1]
    assert (place / "stopped").exists() and not (tmp_path / "out").exists()
    saved = next(Workspace(tmp_path / "out.upfit-work").checkpoints())
    assert int(saved.name[5:]) == len(metrics(place)) >= 2
