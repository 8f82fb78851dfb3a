"""The training loop: which rows, which gradients, when to save and when to stop. Everything it needs comes in a `Run`.

Processes agree on a few things (labels in the step, a signal, a checkpoint due) in one small reduction before each step, and on
the losses in another after it.
"""

import contextlib
import math
import time
from dataclasses import replace
from typing import Any

import torch

from upfit.errors import UpfitError
from upfit.uptrain.data.dataloader import RowGroup, averages, tensors
from upfit.uptrain.model import converted_modules
from upfit.uptrain.model.parallel import full
from upfit.uptrain.run import checkpointing
from upfit.uptrain.run.metrics import record, show
from upfit.uptrain.run.run import MEASURE_EVERY, Learner, Run
from upfit.uptrain.schedule import learning_rate


def train(run: Run) -> bool:
    """Do the steps that are left; False when a signal ended the run early (its state is then saved)."""
    plan = run.plan
    began, first, done = time.monotonic(), run.counters.step, 0
    run.progress.stand_at(run.counters)
    with run.output.progress("uptrain", plan.steps) as meter:
        meter.start_at(first)
        while run.counters.step < plan.steps:
            counters, start = run.counters, time.monotonic()
            groups, trouble = take(run)
            counts = [sum(group.tokens for group in groups), *(group.labels for group in groups)]
            wishes = [run.stop.is_set(), checkpointing.save_due(run), trouble is not None]
            stopping, saving, failing, tokens, *labels = run.total([*wishes, *counts]).tolist()
            run.saver.settle()
            if failing:
                checkpointing.save(run)
                checkpointing.finish(run)
                raise trouble or UpfitError("another process could not read its rows and tells why; all end here")
            if stopping:
                checkpointing.stop(run)
                return False
            if saving:
                checkpointing.save(run)
            counters.tokens += round(tokens)
            line = one_step(run, groups, labels)
            seconds = time.monotonic() - start
            counters.seconds += seconds
            line |= {"tokens_per_second": tokens / seconds, "seconds": counters.seconds}
            if counters.step % MEASURE_EVERY == 0 or counters.step == plan.steps:
                line |= converted_modules.measures(run.learner.student)
            if run.config.measure_every is not None and counters.step % run.config.measure_every == 0:
                line |= {f"holdout_{name}": value for name, value in measure(run, run.learner).items()}
            done += 1
            record(run, line)
            show(run, meter, line, (time.monotonic() - began) / done)
            if not counters.bad:
                run.progress.sound = replace(counters)
            elif counters.bad > run.config.max_bad_steps:
                checkpointing.roll_back(run)
                meter.advance(run.counters.step - counters.step)
    checkpointing.save(run)  # where there is no room for it, there may be for the result, which is smaller
    checkpointing.finish(run)
    return True


def take(run: Run) -> tuple[list[RowGroup], UpfitError | None]:
    """This process's share of the step at hand, or why it cannot be read: then all processes save and end together."""
    data = checkpointing.data_step(run.counters.step, run.counters.rollbacks)
    try:
        return run.sampler.of_step(data, run.accelerator.process_index, run.world), None
    except UpfitError as error:
        return [RowGroup(name, []) for name in run.sampler.names], error


def one_step(run: Run, groups: list[RowGroup], labels: list[float]) -> dict[str, Any]:
    """Gradients of this process's rows, summed over all, and one update; the step's line for metrics.jsonl.

    The loss of a group is the sum over all its `labels` in the step divided by their number, whatever the processes and
    micro-batches: data-parallel training averages gradients over processes, hence the factor `world`.
    """
    counters, config = run.counters, run.config
    # Seeded by the step, so that dropout after a resume is what it would have been.
    torch.manual_seed(((config.seed * 1_000_003 + counters.step) * 4099 + run.accelerator.process_index) % 2**63)
    rate = learning_rate(counters.step, run.plan.steps, run.peak, config.warmup, config.decay, config.min_rate)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    converted_modules.set_progress(run.learner.student, counters.step, run.plan.steps)
    run.optimizer.zero_grad(set_to_none=True)
    counts = [max(1.0, count) for count in labels]
    sums = torch.zeros(len(groups), 1 + run.learner.values, device=run.accelerator.device)
    batches = [(index, batch) for index, group in enumerate(groups) for batch in run.batches(group.rows)]
    batches += [(0, [run.sampler.main.empty()])] * run.lacking(len(batches))
    for number, (index, batch) in enumerate(batches, 1):
        # Shards add up what they are sent; whole gradients to add up would take the memory that sharding saves.
        with contextlib.nullcontext() if run.sharded or number == len(batches) else run.accelerator.no_sync(run.module):
            loss, *values = run.module(*tensors(batch, run.accelerator.device), groups[index].name)
            run.accelerator.backward(loss * (run.world * groups[index].weight / counts[index]))
        sums[index] += torch.stack([loss.detach(), *values]).float()
    norm = full(run.accelerator.clip_grad_norm_(run.learner.parameters(), config.clip))
    means = [[value / count for value in row] for row, count in zip(run.total(sums).tolist(), counts, strict=True)]
    loss_mean = sum(group.weight * mean[0] for group, mean in zip(groups, means, strict=True))
    # The sums are everybody's and the gradients are averaged, so every process comes to the same answer.
    fine = math.isfinite(loss_mean) and math.isfinite(float(norm))
    if fine:
        run.optimizer.step()
    counters.step += 1
    counters.bad = 0 if fine else counters.bad + 1
    counters.skipped += not fine
    return {
        "stage": run.stage,
        "step": counters.step,
        "tokens": counters.tokens,
        "loss": loss_mean,
        **by_name(run.learner, groups, [mean[1:] for mean in means]),
        "lr": rate,
        "grad_norm": float(norm),
        "skipped": counters.skipped,
        "rollbacks": sum(step < counters.step for step, *_ in counters.rollbacks),
    }


def by_name(learner: Learner, groups: list[RowGroup], means: list[list[float]]) -> dict[str, Any]:
    """What the learner measured of each group, by the group's name."""
    return {
        f"{group.name}{key}": value
        for group, mean in zip(groups, means, strict=True)
        for key, value in learner.metrics(mean).items()
    }


@torch.no_grad()
def measure(run: Run, learner: Learner) -> dict[str, Any]:
    """What `learner` measures of the held-out rows of each group and source, averaged over their labels; empty without them."""
    groups = run.sampler.held_out(run.accelerator.process_index, run.world)
    was_training = learner.training
    learner.eval()
    sums = torch.zeros(len(groups), 1 + learner.values, device=run.accelerator.device)
    for index, group in enumerate(groups):
        sums[index, -1] = group.labels
        batches = list(run.batches(group.rows))
        for batch in batches + [[run.sampler.main.empty()]] * run.lacking(len(batches)):
            _, *values = learner(*tensors(batch, run.accelerator.device), group.name)
            sums[index, :-1] += torch.stack(values).float()
    learner.train(was_training)
    return averages(groups, run.total(sums).tolist(), learner.metrics)
