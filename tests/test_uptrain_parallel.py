"""Sharded runs on two CPU processes: the losses of one process, the same bytes after a resume, checkpoints that any number of
processes can go on from. One launch makes all runs on two processes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.folders import save_tiny, tiny_llama
from tests.test_latent_trained import with_latent
from tests.test_uptrain_answers import SETTINGS, make_home
from tests.test_uptrain_attention import differential
from tests.test_uptrain_resume import Interrupting
from tests.uptraining import BASE, QUIET, Workshop, make_workshop, metrics, weights
from tests.warm_python import ENVIRONMENT, shared_python
from upfit.checkpoint.work_folder import LOCK, MARK
from upfit.errors import UpfitError
from upfit.uptrain.config import Config
from upfit.uptrain.model import parallel
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.losses import Objective
from upfit.uptrain.model.model_traits import examine
from upfit.uptrain.model.parallel import Mesh, mesh_of, prepare
from upfit.uptrain.run.state import Workspace
from upfit.uptrain.train import uptrain

pytestmark = pytest.mark.xdist_group("parallel")  # the runs that its tests look at are made once
ROOT = Path(__file__).parent.parent
SIX: dict[str, Any] = {**BASE, "tokens": "768", "save_every": "100"}  # steps
SUMMED = 1e-6  # relative difference of losses: float32 sums in another order
DRIVER = """
import json, os, shutil, sys
from pathlib import Path
import torch
from torch.distributed.fsdp import FSDPModule
from accelerate.state import AcceleratorState
from tests.test_uptrain_resume import Interrupting
from upfit.output import Output
from upfit.uptrain.run import loop
from upfit.uptrain.config import Config
from upfit.uptrain.train import uptrain

torch.set_num_threads(1)
os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("A_NODE", os.environ["LOCAL_WORLD_SIZE"])
end, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
one_step = loop.one_step
def looked_at(run, *rest):  # accelerate makes DDP of FSDP where it does not like the device
    layers = [isinstance(layer, FSDPModule) for layer in run.learner.student.model.layers]
    assert all(layers) if run.config.parallel else not any(layers)
    assert isinstance(getattr(run.learner, "teacher", None), FSDPModule) == run.config.shard_teacher, "teacher"
    return one_step(run, *rest)
loop.one_step = looked_at
for model, data, out, stop, resume, settings in json.loads(sys.argv[1]):
    if resume and resume != out and os.environ["RANK"] == "0":
        shutil.copytree(resume + ".upfit-work", out + ".upfit-work")
    output = Interrupting(stop) if stop else Output(quiet=True)
    if isinstance(settings.get("micro_batch"), list):
        settings["micro_batch"] = settings["micro_batch"][int(os.environ["RANK"])]
    uptrain(model, data, Path(out), Config(**settings), bool(resume), False, output)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
end()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def python() -> str:
    return shared_python()


def launch(python: str, place: Path, processes: int, jobs: list[list[Any]], **environment: str) -> None:
    (place / "driver.py").write_text(DRIVER)
    words = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(place / "driver.py"),
    ]
    subprocess.run([*words, json.dumps(jobs)], env=ENVIRONMENT | environment, check=True, stdout=subprocess.DEVNULL)


def job(shop: Workshop, out: Path, stop: int = 0, resume: Path | None = None, **changes: Any) -> list[Any]:
    """A run for the driver: stopped after `stop` steps, going on from a copy of the run in `resume`."""
    return [str(shop.student), str(shop.data), str(out), stop, str(resume or ""), {**SIX, **changes}]


@pytest.fixture(scope="module")
def shops(place: Path) -> dict[str, Workshop]:
    """Untied and tied heads, and a latent below its norm's epsilon."""
    (place / "shop").mkdir()
    untied = make_workshop(place / "shop")
    student = save_tiny(place / "student", tiny_llama(tie_word_embeddings=True, num_key_value_heads=2))
    teacher = save_tiny(place / "teacher", tiny_llama(tie_word_embeddings=True))
    latent = with_latent(untied, place / "latent")
    return {"untied": untied, "tied": Workshop(teacher, student, untied.data), "latent": latent}


@pytest.fixture(scope="module")
def runs(python: str, place: Path, shops: dict[str, Workshop]) -> Path:
    """The folder of all runs: whole ones, some stopped after three steps, and those that go on from there elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    untied, tied = shops["untied"], shops["tied"]
    fsdp: dict[str, Any] = {"parallel": "fsdp"}
    taught: dict[str, Any] = {"teacher": str(tied.teacher)}
    untied.run(place / "one", **SIX)
    untied.run(place / "one-micro", **SIX, micro_batch=2)
    tied.run(place / "one-tied", **SIX, **taught)
    shops["latent"].run(place / "one-latent", **SIX)
    untied.run(place / "stopped-one", output=Interrupting(3), **SIX)
    untied.run(place / "one-layerwise", **SIX, stages="layerwise")
    untied.run(place / "one-attention", **SIX, trainable="attention")
    (place / "home").mkdir()
    home = make_home(place / "home")
    asked = {**SETTINGS, "tokens": "12000", "micro_batch": 1}
    uptrain(str(home / "model"), str(home / "data"), place / "one-answers", Config(**asked), False, False, QUIET)
    whole = [
        job(untied, place / "ddp-micro", micro_batch=1),
        job(untied, place / "ddp-layerwise", stages="layerwise"),
        job(untied, place / "ddp-attention", trainable="attention"),
        job(untied, place / "fsdp-attention", trainable="attention", **fsdp),
        [str(home / "model"), str(home / "data"), str(place / "ddp-answers"), 0, "", asked],
        job(untied, place / "fsdp", **fsdp),
        job(tied, place / "fsdp-tied", **fsdp, **taught, micro_batch=1, async_save=False),
        job(untied, place / "fsdp-all", **fsdp, shard_teacher=True, gradient_checkpointing=True, micro_batch=[1, 2]),
        job(tied, place / "fsdp-all-tied", **fsdp, **taught, shard_teacher=True),
        job(shops["latent"], place / "fsdp-latent", **fsdp, gradient_checkpointing=True),
    ]
    begun = job(untied, place / "stopped-fsdp", 3, **fsdp)
    resumed = [
        job(untied, place / "fsdp-to-ddp", resume=place / "stopped-fsdp"),
        job(untied, place / "one-to-fsdp", resume=place / "stopped-one", **fsdp),
        job(untied, place / "fsdp-to-fsdp", resume=place / "stopped-fsdp", **fsdp),
    ]
    launch(python, place, 2, [begun, *whole, *resumed])
    shutil.copytree(place / "stopped-fsdp.upfit-work", place / "fsdp-to-one.upfit-work")
    untied.run(place / "fsdp-to-one", resume=True, **SIX)
    torch.set_num_threads(threads)
    return place


def alike(one: Path, other: Path) -> None:
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for key in {"loss", "ce", "kl", "attention_error", "grad_norm"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=SUMMED), (key, ours["step"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-micro", "ddp-micro", "fsdp", "fsdp-tied", "fsdp-all", "fsdp-all-tied"])
def test_processes_micro_batches_and_shards_do_not_change_the_losses(runs: Path, name: str) -> None:
    alike(runs / name, runs / ("one-tied" if "tied" in name else "one"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp-layerwise", "ddp-attention", "fsdp-attention", "ddp-answers", "fsdp-latent"])
def test_nor_does_what_is_learned(runs: Path, name: str) -> None:
    alike(runs / name, runs / f"one-{name.partition('-')[2]}")


@pytest.mark.slow
def test_stopped_and_resumed_a_sharded_run_ends_with_the_same_bytes(runs: Path) -> None:
    assert weights(runs / "fsdp-to-fsdp") == weights(runs / "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-to-one", "fsdp-to-ddp", "one-to-fsdp"])
def test_other_processes_go_on_from_a_checkpoint(runs: Path, name: str) -> None:
    alike(runs / name, runs / "one")
    ours, theirs = (load_file(runs / folder / "model.safetensors") for folder in (name, "one"))
    for tensor, value in theirs.items():  # a gradient that is nothing but rounding still moves its weight by a whole step
        assert (ours[tensor] - value).abs().mean() < 1e-6, tensor


@pytest.mark.slow
def test_copies_of_shards_have_the_losses_of_one_process(
    python: str, place: Path, shops: dict[str, Workshop], tmp_path: Path
) -> None:
    """Two nodes of two processes, launched as accelerate would; measures of converted attention are of whole weights."""
    changed = differential(shops["untied"], tmp_path / "differential", lambdas="head")
    shop = Workshop(shops["untied"].teacher, changed, shops["untied"].data)
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
    text: dict[str, Any] = {"kl_weight": 0.0}  # its KL is nothing but rounding at first
    launch(python, place, 4, [job(shop, tmp_path / "hsdp", parallel="hsdp", **text)], A_NODE="2", **launched)
    shop.run(tmp_path / "one", **SIX, **text)
    alike(tmp_path / "hsdp", tmp_path / "one")
    for name in ("lambda", "cosine"):
        ours, theirs = (metrics(tmp_path / run)[-1][name] for run in ("hsdp", "one"))
        assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-5), name


def lines(place: Path) -> int:
    return (place / "metrics.jsonl").read_bytes().count(b"\n")


SLOW = """
import sys, time
from pathlib import Path
import torch.distributed.checkpoint as dcp
from tests.uptraining import Workshop
write, place = dcp.FileSystemWriter.write_data, Path(sys.argv[4] + ".upfit-work")
def slowly(self, *plan):  # the first checkpoint is late, the second never comes
    late = self.path.name == "step-00000002.tmp"
    (place / "writing").touch()
    while not late or (place / "metrics.jsonl").read_bytes().count(b"\\n") < 4:
        time.sleep(0.01)
    return write(self, *plan)
dcp.FileSystemWriter.write_data = slowly
Workshop(*map(Path, sys.argv[1:4])).run(Path(sys.argv[4]), tokens="768", save_every="2")
"""


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_being_written_it_goes_on_from_the_one_before(
    python: str, shops: dict[str, Workshop], tmp_path: Path
) -> None:
    shop, place = shops["untied"], tmp_path / "out.upfit-work"
    (tmp_path / "slow.py").write_text(SLOW)
    words = [python, str(tmp_path / "slow.py"), str(shop.teacher), str(shop.student), str(shop.data), str(tmp_path / "out")]
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (place / "step-00000004.tmp").exists() or lines(place) < 6:  # it trains while it writes
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(place / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what was killed for the process takes a moment to be gone
    assert [path.name for path in Workspace(tmp_path / "out.upfit-work").checkpoints()] == ["step-00000002"]
    shop.run(tmp_path / "out", resume=True, **SIX)
    shop.run(tmp_path / "whole", **SIX)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole"), "what is written late is what was there in time"
    assert {path.name for path in place.iterdir()} - {MARK, LOCK} == {"writing"}


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line(
    shops: dict[str, Workshop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(UpfitError, match="the checkpoint of step 2 .*No space left on device.* go on with --resume") as caught:
        shops["untied"].run(tmp_path / "out", tokens="512", output=Interrupting(2), async_save=background)
    assert "\n" not in str(caught.value) and not Workspace(tmp_path / "out.upfit-work").newest()


FSDP = {"ACCELERATE_USE_FSDP": "true"}
FOUR = {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
LAUNCHED: list[tuple[dict[str, Any], dict[str, str], Mesh]] = [
    ({}, {}, Mesh()),
    ({"parallel": "fsdp"}, FOUR, Mesh(1, 4)),
    ({"parallel": "hsdp"}, FOUR, Mesh(2, 2)),
    ({"parallel": "hsdp"}, FOUR | {"LOCAL_WORLD_SIZE": "4"}, Mesh(1, 4)),
    ({}, FOUR | FSDP, Mesh(1, 4)),
    ({}, FOUR | FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, Mesh(2, 2)),
]
REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"parallel": "fsdp"}, {}, "--parallel fsdp got a single process; start several with torchrun"),
    ({"parallel": "ddp"}, FOUR | FSDP, "leave one of the two out"),
    ({"parallel": "hsdp"}, FOUR | {"LOCAL_WORLD_SIZE": "1"}, "give --parallel fsdp"),
    ({"shard_teacher": True}, FOUR, "shard_teacher goes with --parallel"),
]


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in (*FOUR, *FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("settings, environment, mesh", LAUNCHED)
def test_flags_and_launchers_mean_the_same(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], environment: dict[str, str], mesh: Mesh
) -> None:
    set_environment(monkeypatch, environment)
    assert mesh_of(Config(**settings)) == mesh


@pytest.mark.parametrize("settings, environment, told", REFUSED)
def test_what_cannot_be_sharded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], environment: dict[str, str], told: str
) -> None:
    set_environment(monkeypatch, environment)
    with pytest.raises(UpfitError, match=told) as caught:
        mesh_of(Config(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_process_has_weights_and_gradients_are_added_up_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Whatever the launcher asks of accelerate: the model is tried before it is sharded."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(parallel, "Accelerator", SimpleNamespace)
    accelerator: Any = parallel.accelerator_for(Mesh(1, 2), dtype)
    plugin, policy = accelerator.fsdp_plugin, accelerator.fsdp_plugin.mixed_precision_policy
    assert plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"
    assert policy.reduce_dtype == torch.float32 and policy.param_dtype == (None if dtype == torch.float32 else dtype)
    assert accelerator.mixed_precision == "no" and accelerator.parallelism_config is None


def test_a_single_number_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.register_parameter("share", torch.nn.Parameter(torch.tensor(0.5)))
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    distiller = Distiller(model, examine(model), None, {"": Objective()})
    with pytest.raises(UpfitError, match="cannot shard share"):
        prepare(Accelerator(cpu=True), distiller, torch.optim.SGD(model.parameters()), False)
