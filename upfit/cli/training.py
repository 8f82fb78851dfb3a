"""`upfit prepare`, `synth`, `plan` and `uptrain`: data, what training costs, and training."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from upfit.cli.base import Json, Overwrite, Quiet, Revision, app, with_flags
from upfit.longcontext.options import Options as SynthOptions
from upfit.output import Output, human_bytes, human_count
from upfit.plan.options import Options as PlanOptions
from upfit.uptrain.config import Config as UptrainConfig


@app.command()
def prepare(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; work lies in OUT.upfit-work until it is whole.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer is used: folder or hub id.")],
    field: Annotated[str, typer.Option(help="Field of JSON and parquet that holds the text.")] = "text",
    tokens: Annotated[str | None, typer.Option(help="Stop after so many tokens, such as 100M; default: all.")] = None,
    workers: Annotated[int | None, typer.Option(help="Batches tokenised at a time; default: as many as cores.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn text into token shards for uptraining (txt, jsonl, json, parquet, gz of them, hub data set)."""
    from upfit.uptrain.data.prepare import prepare as run

    output = Output(as_json, quiet)
    manifest = run(list(texts), out, tokenizer, field, output, overwrite, tokens, workers)
    output.json(manifest)
    output.line(f"Wrote {out}: {human_count(manifest['tokens'])} tokens of {manifest['documents']} documents")
    output.note(f"Next: upfit uptrain MODEL {out} OUT --tokens {human_count(manifest['tokens']).replace(' ', '')}")


def _synth(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Files, folders, or a hub data set id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; work lies in OUT.upfit-work until it is whole.")],
    flags: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Long-context training data: questions whose answers stand anywhere in 4k to 32k tokens (IN2)."""
    from upfit.longcontext.synth import synth as run

    output = Output(as_json, quiet)
    answer = run(list(texts), out, SynthOptions(**flags), output)
    output.json(answer)
    if not answer["finished"]:
        output.line(f"This part is done; {len(answer['missing'])} others are not yet, such as {answer['missing'][0]}")
        return
    families = ", ".join(f"{name} {count:,}" for name, count in answer["families"].items())
    recipes = human_bytes(answer["bytes"])
    output.line(f"Wrote {out}: {answer['items']:,} examples ({families}), their contexts as {recipes} of recipes")


app.command("synth")(with_flags(_synth, SynthOptions, "synth"))


def _plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    flags: dict[str, Any],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """FLOPs, memory and GPU-hours of an uptraining, before anything runs."""
    from upfit.plan.plan import plan as run
    from upfit.plan.show import show as show_plan

    output = Output(as_json)
    told = run(model, PlanOptions(**flags), revision)
    output.json(told)
    show_plan(told, output)


app.command("plan")(with_flags(_plan, PlanOptions, "plan"))


def _uptrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model to train: folder or hub id.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Text of `upfit prepare` (several: code=0.7,prose=0.3) or questions of `upfit synth`."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; checkpoints go to OUT.upfit-work.")],
    flags: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with these and more settings (see docs); flags go first."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of OUT.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to be good again, with its former self as teacher."""
    from upfit.uptrain.config import resolve, tables

    resolved = resolve(config, {name: value for name, value in flags.items() if value is not None})
    from upfit.uptrain.train import uptrain as run  # imports torch: what is wrong with settings is told before

    output = Output(as_json, quiet)
    report = run(model, data, out, resolved, resume, overwrite, output, tables(config))
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process comes here, one tells
        output.json(report)
        _show_uptraining(report, out, output)


def _show_uptraining(report: dict[str, Any], out: Path, output: Output) -> None:
    if report["stopped"]:
        where = f"step {report['step']} of {report['steps']}" + (f" of {report['stage']}" if "stages" in report else "")
        output.line(f"Stopped at {where}; the same command with --resume goes on")
        return
    for one in report.get("stages", [report]):
        _show_stage(one, f"{one['stage'].capitalize()}" if "stages" in report else f"Wrote {out}", output)
    if "stages" in report:
        output.line(f"Wrote {out}")
    output.note(f"Next: upfit evaluate {out} --against SOURCE")


def _show_stage(report: dict[str, Any], title: str, output: Output) -> None:
    output.line(
        f"{title}: {human_count(report['tokens'])} tokens in {report['seconds']:.0f} s, "
        f"{report['tokens_per_second']:.0f} tokens/s, {report['skipped']} steps skipped"
    )
    before, after = report["holdout"]["before"], report["holdout"]["after"]
    rows = f"of {report['holdout_rows']} rows of DATA"
    if "attention_error" in before:
        errors = f"{before['attention_error']:.4f} → {after['attention_error']:.4f}"
        output.line(f"Held-out error of attention outputs {rows}: {errors} of the teacher's mean square")
    elif before:
        line = f"Held-out loss {rows}: {before['ce']:.3f} → {after['ce']:.3f} nats a token"
        output.line(line + (f" (teacher {before['teacher_ce']:.3f})" if "teacher_ce" in before else ""))
        for name in (key.removesuffix("/ce") for key in before if key.endswith("/ce")):
            output.line(f"  {name}: {before[f'{name}/ce']:.3f} → {after[f'{name}/ce']:.3f}")


app.command("uptrain")(with_flags(_uptrain, UptrainConfig, "uptrain", unset=True))
