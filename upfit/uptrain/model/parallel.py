"""One model over several processes: a whole copy on each (DDP), sharded (FSDP2), or sharded within nodes and copied between
them (HSDP).

accelerate does the work; this file configures it, and reads what is sharded. Sharded weights are whole only while the module
that was given to accelerate runs forward. Whatever reads them elsewhere does so through this file.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from upfit.errors import UpfitError
from upfit.uptrain.config import Config, check_sharding
from upfit.uptrain.model.distiller import Distiller
from upfit.uptrain.model.layerwise import Layerwise

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what recomputing and compiling put into the names of parameters


@dataclass(frozen=True)
class Mesh:
    """Processes: `copies` of the model, each sharded over `shards` of them; no shards are DDP."""

    copies: int = 1
    shards: int = 0


def mesh_of(config: Config) -> Mesh:
    """What `--parallel`, or else `accelerate launch`, asks for. Raises UpfitError where the processes are not there."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    asked = config.parallel or ("fsdp" if launched else "ddp")
    if asked == "ddp":
        if launched:
            raise UpfitError("--parallel ddp, but accelerate launch was told to use FSDP; leave one of the two out")
        check_sharding(config, sharded=False)
        return Mesh()
    if "LOCAL_RANK" not in os.environ:
        raise UpfitError(
            f"--parallel {asked} got a single process; start several with torchrun --nproc-per-node N -m upfit uptrain ..., "
            "or leave it out"
        )
    world = int(os.environ["WORLD_SIZE"])
    shards = int(os.environ["LOCAL_WORLD_SIZE"]) if asked == "hsdp" else world
    if config.parallel is None:
        shards = world // int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    if asked == "hsdp" and (world % shards or shards == 1):
        raise UpfitError(
            f"--parallel hsdp shards within a node, here are {shards} of {world} processes; "
            "start the same number, two or more, on each node, or give --parallel fsdp"
        )
    return Mesh(world // shards, shards)


def accelerator_for(mesh: Mesh, dtype: torch.dtype, **settings: Any) -> Accelerator:
    """accelerate's engine: products in `dtype`, gradients added up over processes in float32.

    accelerate would add them up in `dtype`, and it makes DDP of FSDP on CPUs without a word. There it is told afterwards: the
    code that shards is the same.
    """
    cpu = not torch.accelerator.is_available()
    if not mesh.shards:
        return Accelerator(cpu=cpu, mixed_precision="no", **settings)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        ),
        cpu_ram_efficient_loading=False,  # every process tries the model on a few tokens before it is sharded
    )
    layout = ParallelismConfig(dp_replicate_size=mesh.copies, dp_shard_size=mesh.shards) if mesh.copies > 1 else None
    if not cpu:
        return Accelerator(fsdp_plugin=plugin, parallelism_config=layout, mixed_precision="no", **settings)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision="no", **settings)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # one state for all that ask
    accelerator.state.fsdp_plugin = plugin
    if layout is not None:
        accelerator.state.parallelism_config, accelerator.state.device_mesh = layout, layout.get_device_mesh("cpu")
    return accelerator


def recompute(model: nn.Module) -> None:
    """Wrap each layer, before it is sharded, so that it keeps only its input for the backward pass."""
    names = layer_classes(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ in names:
            model.set_submodule(name, checkpoint_wrapper(module))


def layer_classes(model: nn.Module) -> list[str]:
    """The classes of layers: of what transformers would keep on one device, those that `model` has."""
    known = {type(module).__name__ for module in model.modules()}
    return sorted(known & set(getattr(model, "_no_split_modules", None) or ()))


def prepare(
    accelerator: Accelerator, learner: Distiller | Layerwise, optimizer: torch.optim.Optimizer, shard_teacher: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The learner as accelerate wraps it, and the optimiser. Sharded are each layer of the student, and together all else:
    embedding, last norm and head, tied or not. Raises UpfitError for weights that FSDP2 cannot shard."""
    if accelerator.is_fsdp2:
        for name, parameter in learner.student.named_parameters():
            if parameter.ndim == 0:
                raise UpfitError(f"--parallel: FSDP2 cannot shard {name}, which is a single number; leave it out")
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(learner.student)
    module, prepared = accelerator.prepare(learner, optimizer)
    if shard_teacher and isinstance(learner, Distiller) and learner.teacher is not None:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(learner.teacher.student)
        teacher = fsdp2_prepare_model(accelerator, learner.teacher)
        for method in ("states", "logits"):
            register_fsdp_forward_method(teacher, method)
    return module, prepared


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: nn.Module, here: bool) -> dict[str, Tensor]:
    """The whole state dict in the memory of the host, if it is wanted `here`; tensor by tensor, and every process must ask."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor.detach())
        if here:
            weights[plain(name)] = whole.cpu()
    return weights


def whole_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of `model`; one that is sharded has its weights whole while it, or what is in it, is looked at.

    Every process must go through all of them.
    """
    unit: Any = None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if unit is not None:
                unit.reshard()
            unit = module
            unit.unshard()
        yield module
    if unit is not None:
        unit.reshard()


def plain(name: str) -> str:
    """The name of a parameter as the model in its folder has it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
