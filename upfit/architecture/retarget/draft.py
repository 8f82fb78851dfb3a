"""Tools for converting one family into another: a draft that collects renames and rules, common config keys, row orders.

Shapes: H heads, D head width, E hidden width, F width of the MLP. Linear weights are [out, in].
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from upfit.architecture.meta_model import model_class_for, read_as_class
from upfit.architecture.names import disk_names, name_map
from upfit.architecture.table import Described
from upfit.checkpoint.plan import Rule
from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("weight", "bias")
Named = dict[str, "Tensor"]


class Draft:
    """Gathers how the tensors of one checkpoint become those of another family.

    Tensors of the source are named by the parameters of its class, so it does not matter which prefixes a file has, and what
    no parameter needs (buffers of old files) is left out. `config` is `config.json` with all defaults of its class filled in.
    """

    def __init__(self, raw: Mapping[str, Any], tensors: Mapping[str, Described]) -> None:
        self.raw = dict(raw)
        self.config = read_as_class(self.raw)
        self.names = name_map(self.raw, stored=True)
        self.disk = disk_names(self.names, tensors)
        self.renames: dict[str, str] = {}
        self.rules: list[Rule] = []

    def has(self, parameter: str) -> bool:
        return parameter in self.names.shapes

    def stored(self, parameter: str) -> str:
        """The name in the file. Raises UpfitError when the tensor is not there."""
        for name in (parameter, *self.names.tied.get(parameter, ())):
            if name in self.disk:
                return self.disk[name]
        shape = list(self.names.shapes.get(parameter, ()))
        raise UpfitError(f"the checkpoint has no tensor of shape {shape} for {parameter}; fetch it again")

    def keep(self, target: str, source: str, kinds: Iterable[str] = KINDS) -> None:
        """Weight and bias of module `source` are those of `target`, byte for byte; or weight alone where there is no bias."""
        for kind in kinds:
            if self.has(f"{source}.{kind}"):
                self.renames[f"{target}.{kind}"] = self.stored(f"{source}.{kind}")

    def make(self, label: str, reads: Iterable[str], writes: Iterable[str], make: Callable[[Named], Named]) -> None:
        """Parameters `reads` (those the class has) become tensors `writes`. `make` gets and gives them by these names."""
        stored = {name: self.stored(name) for name in reads if self.has(name)}

        def apply(tensors: "Mapping[str, Tensor]") -> Named:
            results = make({name: tensors[disk] for name, disk in stored.items()})
            return {name: tensor.contiguous() for name, tensor in results.items()}

        self.rules.append(Rule(tuple(dict.fromkeys(stored.values())), tuple(writes), apply, label))

    def with_bias(self, target: str, source: str) -> None:
        """Module `source` is `target`; where it has no bias, zeros."""
        self.keep(target, source)
        if not self.has(f"{source}.bias"):
            self.zero_bias(target, source)

    def zero_bias(self, target: str, source: str) -> None:
        weight, bias = f"{source}.weight", f"{target}.bias"
        self.make("zero bias", (weight,), (bias,), lambda tensors: {bias: zero_bias(tensors[weight])})

    def head(self, target: str, source: str) -> None:
        """The output matrix, where it is stored; a tied one follows the embeddings, as in the source."""
        if f"{source}.weight" in self.disk or not self.config.tie_word_embeddings:
            self.keep(target, source, ("weight",))


def check_class(raw: Mapping[str, Any]) -> None:
    """Raise UpfitError unless the checkpoint is that of a language model of its type, with its output head."""
    from transformers import CONFIG_MAPPING

    model_class = model_class_for(dict(raw))
    name = model_class.__name__
    if model_class.config_class is not CONFIG_MAPPING[raw["model_type"]]:
        raise UpfitError(f"config.json names the class {name}, which is not of its model_type {raw['model_type']}; correct one")
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UpfitError(f"a {name} cannot be moved to another family; give the language model it belongs to")


def common(draft: Draft, model_type: str, architecture: str) -> dict[str, Any]:
    """The keys of `config.json` that mean the same in every family."""
    return common_keys(draft.raw, draft.config, model_type, architecture)


def common_keys(raw: Mapping[str, Any], config: Any, model_type: str, architecture: str) -> dict[str, Any]:
    """`common`, of a `config.json` and of what its class reads in it."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    settings: dict[str, Any] = {"architectures": [architecture], "model_type": model_type, "vocab_size": config.vocab_size}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[key] = getattr(config, key, None)
    # Where no tokenizer file names its class, transformers goes by the model type, which is now another one.
    tokenizer = raw.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(raw["model_type"])
    settings |= {"tokenizer_class": tokenizer} if tokenizer else {}
    settings |= {"tie_word_embeddings": config.tie_word_embeddings, "use_cache": config.use_cache}
    return settings | {key: raw[key] for key in ("dtype", "torch_dtype", "task_specific_params") if key in raw}


def rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as transformers 5 writes them, and beside them what its predecessors and other tools read."""
    settings = {"rope_parameters": dict(parameters), "rope_theta": parameters["rope_theta"]}
    settings["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if parameters["rope_type"] != "default":
        own = ("rope_theta", "partial_rotary_factor")
        settings["rope_scaling"] = {key: value for key, value in parameters.items() if key not in own}
    return settings


def rotary_share(width: int, head_dim: int) -> float:
    """The share of `head_dim` of which transformers' `int(head_dim * share)` is `width`."""
    share = width / head_dim
    return share if int(head_dim * share) == width else math.nextafter(share, 1.0)


def split_heads(fused: "Tensor", heads: int) -> "tuple[Tensor, ...]":
    """[H * 3 * D, ...] with q, k and v in turn for each head, to three of [H * D, ...]."""
    return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (heads, 3, -1)).unbind(1))


def join_heads(heads: int, q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
    """The inverse of `split_heads`."""
    import torch

    return torch.stack([part.unflatten(0, (heads, -1)) for part in (q, k, v)], 1).flatten(0, 2)


def halves(rows: "Tensor", heads: int, width: int) -> "Tensor":
    """[H * D, ...] whose first `width` rows of a head are rotated as neighbours, to rows rotated as two halves."""
    import torch

    parts = rows.unflatten(0, (heads, -1))
    return torch.cat([parts[:, 0:width:2], parts[:, 1:width:2], parts[:, width:]], 1).flatten(0, 1)


def zero_bias(weight: "Tensor") -> "Tensor":
    """[out] zeros in the type and place of a weight [out, in]."""
    return weight.new_zeros(weight.shape[0])


def names(module: str) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"


def projections(attention: str) -> tuple[str, ...]:
    """Weight and bias of q, k and v of one attention module, in this order."""
    return tuple(name for part in "qkv" for name in names(f"{attention}.{part}_proj"))
