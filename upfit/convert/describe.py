"""What `upfit show` tells of a folder, from its config and headers alone."""

from typing import Any

from upfit import provenance
from upfit.architecture.table import check_known, has_two_ways
from upfit.checkpoint.reader import open_checkpoint
from upfit.checkpoint.source import find_source
from upfit.convert.recipe import find_recipes
from upfit.convert.result import Description
from upfit.modeling.registry import is_own
from upfit.results import Origin


def describe(model: str, revision: str | None = None) -> Description:
    """Architecture, head counts (one value for every kind of layer), sizes in bytes, history, and possible conversions.

    Raises UpfitError for a folder that cannot be read or an architecture that is not supported.
    """
    source = find_source(model, revision)  # what is not there is told before torch is imported
    from upfit.architecture.grouped_class import is_grouped
    from upfit.architecture.latent import is_latent
    from upfit.architecture.layers import bind
    from upfit.architecture.meta_model import model_class_for
    from upfit.architecture.quantised import check_not_quantised
    from upfit.examples.kinds import encoder_reads

    with open_checkpoint(source.path) as checkpoint:
        latent = is_latent(checkpoint.tensors)
        if not latent:
            check_known(checkpoint.config)
        check_not_quantised(checkpoint)
        architecture = bind(checkpoint.config, checkpoint.tensors)
        seen = architecture.config["model_type"]
        shapes = [layer.geometry for layer in architecture.layers]
        closed = latent or (is_own(checkpoint.config) and not is_grouped(checkpoint.config))
        recipes = {} if closed else find_recipes()
        ways = [architecture]
        if not latent and has_two_ways(checkpoint.config):
            ways.append(bind(checkpoint.config, checkpoint.tensors, own=True))
        offers = [(name, recipe.offers(way)) for name, recipe in recipes.items() for way in ways]
        return Description(
            model=Origin(**source.record()),
            model_type=checkpoint.config["model_type"],
            converted_as=seen if seen != checkpoint.config["model_type"] else None,
            class_=model_class_for(checkpoint.config).__name__,
            parameters=checkpoint.numel,
            bytes=checkpoint.nbytes,
            dtypes=sorted({info.dtype for info in checkpoint.tensors.values()}),
            layers=len(shapes),
            heads=sorted({shape.heads for shape in shapes}),
            kv_heads=sorted({shape.kv_heads for shape in shapes}),
            head_dim=sorted({shape.head_dim for shape in shapes}),
            kv_bytes_per_token=architecture.kv_bytes_per_token,
            reads=encoder_reads(checkpoint.config),
            cross_bytes_per_position=architecture.cross_bytes_per_position or None,
            latent=architecture.latent_numbers or None,
            sliding_windows=sliding_windows(checkpoint.config),
            history=provenance.read(source.path),
            can_become=[f"{name} {offer}".strip() for name, offer in dict.fromkeys(offers) if offer],
        )


def sliding_windows(config: dict[str, Any]) -> dict[str, int]:
    """Tokens of a sliding window -> layers that have it, as the config's class reads them; empty where all layers see all."""
    from upfit.architecture.meta_model import read_as_class

    parsed = read_as_class(config).get_text_config(decoder=True)
    window, kinds = getattr(parsed, "sliding_window", None), getattr(parsed, "layer_types", None)
    if not window or not getattr(parsed, "use_sliding_window", True):
        return {}
    layers = parsed.num_hidden_layers if kinds is None else kinds.count("sliding_attention")
    return {str(window): layers} if layers else {}
