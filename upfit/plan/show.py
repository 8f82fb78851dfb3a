"""The answer of `upfit plan` as lines. Only reads the dictionary that `--json` prints."""

from typing import Any

from upfit.output import Output, human_bytes, human_count

# fmt: off
PARTS = (
    "weights", "moments", "gradients", "weights_in_bfloat16", "gathered", "teacher", "activations", "one_layer_backward",
    "mask", "head", "logits",
)
# fmt: on


def show(told: dict[str, Any], output: Output) -> None:
    """Print what `plan` returned."""
    flops, memory, gpu = told["flops_a_token"], told["memory"], told["gpu"]
    learned = "none" if told["teacher_parameters"] is None else human_count(told["teacher_parameters"])
    share = "" if told["share_of_original"] is None else f", {told['share_of_original']:.2%} of the original compute"
    lines = [
        ["parameters", f"{human_count(told['parameters'])}, teacher {learned}"],
        ["tokens", f"{human_count(told['tokens'])}, rows of {told['length']}"],
        ["FLOPs", f"{told['flops']:.3g}{share}"],
        ["a token", f"{_giga(flops['total'])}: forward {_giga(flops['forward'])}, of which attention "
                    f"{_giga(flops['attention_in_forward'])} (causal); backward {_giga(flops['backward'])}; "
                    f"teacher {_giga(flops['teacher'])}"],
        ["by the rule", f"{_giga(flops['six_n'])} a token without the teacher (six a parameter, attention left out)"],
        ["time", f"{told['hours']:,.1f} h on {gpu['gpus']} x {gpu['name']} ({told['gpu_hours']:,.1f} GPU-hours), if "
                 f"{told['mfu']:.0%} of {gpu['peak_flops'] / 1e12:,.0f} TFLOP/s are reached: an assumption, not a measurement"],
        ["memory", f"{human_bytes(memory['peak'])} of {human_bytes(gpu['memory'])} a GPU, {memory['rows']:.0f} rows at once"],
        *[["" if number else "by part", f"{name.replace('_', ' ')} {human_bytes(memory[name])}"]
          for number, name in enumerate(PARTS)],
    ]  # fmt: skip
    if len(told["stages"]) > 1:
        lines += [
            [
                f"{one['stage']}",
                f"{human_count(one['tokens'])} tokens, {_giga(one['flops_a_token']['total'])} a token, "
                f"{one['gpu_hours']:,.1f} GPU-hours, {human_bytes(one['memory']['peak'])}",
            ]
            for one in told["stages"]
        ]
    for name, value in lines:
        output.line(f"{name:12} {value}")


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.3g} GFLOP"
