"""The settings of contextual positions, and the tensors that they add."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upfit.options import option
from upfit.text.files import FIELD, FIELD_HELP

if TYPE_CHECKING:
    from upfit.architecture.attention import Layer


ON_TEXT = ("gates", "content", "keys")  # constant ones are not set on text
CALIBRATION = ("calibration", "calibration_tokens", "calibration_length", "field")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `upfit convert cope`."""

    positions: int = option(64, at_least=2, help="learned positions; farther keys are all at the last one")
    gates: Literal["content", "keys", "constant"] = option(
        "content",
        help="what a position counts. content: query times key, before rotation; keys: query times a learned key of its own, "
        "which is cached too; constant: every token alike, the control",
    )
    span: int | None = option(
        None, help="tokens after which the last position is reached at first, on average; default: four times --positions"
    )
    embeddings: Literal["shared", "heads"] = option("shared", help="one table of embeddings a layer, or one a head")
    every: int = option(1, at_least=1, help="contextual positions in every so many-th layer")
    scale: Literal["paper", "code"] = option(
        "paper", help="position logits q·e as in the paper's listing, or divided by √d like content, as in the authors' code"
    )
    drop_rope: bool = option(False, help="fade the rotary positions out in the first half of uptraining, for CoPE alone")
    calibration: list[str] | None = option(
        None, goes_with=ON_TEXT, help="text files or folders to set the gates on; default: Python's standard library"
    )
    field: str = option(FIELD, goes_with=("calibration",), help=FIELD_HELP)
    calibration_tokens: str | None = option(
        None, goes_with=ON_TEXT, help="tokens of calibration text to use, such as 64k (the default)"
    )
    calibration_length: int | None = option(
        None, goes_with=ON_TEXT, help="tokens of a calibration window; default: 2048, or what the model allows"
    )

    @property
    def reach(self) -> int:
        return self.span or 4 * self.positions

    @property
    def share(self) -> float:
        """The mean gate that reaches the last position after as many tokens."""
        return (self.positions - 1) / self.reach


def new_tensors(layer: "Layer", options: Options) -> "dict[str, tuple[int, ...]]":
    """What a layer gets: names after its stem, and shapes."""
    shape = layer.geometry
    table: tuple[int, ...] = (options.positions, shape.head_dim)
    sizes = {"cope_embeddings": table if options.embeddings == "shared" else (shape.heads, *table)}
    sizes["cope_gate_bias"] = (shape.heads,)
    if options.gates != "constant":
        sizes["cope_gate_scale"] = (shape.heads,)
    return sizes
