"""The small decoders of the CoPE paper, trained from scratch on one of its tasks, with different positions.

    python -m benchmarks.cope_tasks counting --variables 1 --results benchmarks/results/NAME.json
    python -m benchmarks.cope_tasks counting --max-steps 64 --layers 2 --hidden 128 --train-steps 600 --learning-rates 1e-3 ...

Positions: absolute (a learned embedding added to each token's), relative (learned, by distance, on keys; one table for all
layers), rope, cope, rope+cope. The rest is the same for all, and as the authors' code and `run.sh` have it (arXiv 2405.18719;
facebookresearch/RAM, projects/cope), as far as it is public: 4 layers, width 256, 4 heads, ReLU of 1024, norms after the
residual sums, tied embeddings, dropout 0.1, Adam at a constant 7e-5, batch 64, loss on answers, 100 passes over 10,000
programs. Not as theirs: no dropout on attention weights (`--attention-dropout 0.1` has it, but CoPE then goes without its
kernels), and position logits are not divided by √d (`--scale code`). Not public, so assumed: all of the training on Flip-Flop
and selective copy, and how CoPE goes with RoPE (gates and position logits from queries and keys before the rotation).

CoPE is `upfit.modeling.cope_equations`. Told are errors in % on test items that no run trains on, the same for all runs, over
answers and over whole sequences; intervals are over seeds (initial weights, order, dropout). With several --learning-rates each
kind of positions takes the one with the fewest errors on items drawn for choosing, after --choose-steps. Items are drawn at
random, so test items may stand in the training set: their share is told. Longer programs are cut to a block as much longer;
absolute positions beyond the training block have never been trained, relative ones are those of its end. The results file is
written after each run, and runs that stand in it already are not done again.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upfit.environment import environment
from upfit.evaluate.intervals import mean_interval
from upfit.evaluate.synthetic import counting, flipflop, selective_copy
from upfit.evaluate.synthetic.items import Item
from upfit.modeling.cope_attention import attend
from upfit.modeling.cope_equations import Inputs, Sight, whole

POSITIONS = ("absolute", "relative", "rope", "cope", "rope+cope")
ROPE_BASE = 10_000.0
IGNORED = -100  # what cross_entropy does not look at
Maker = Callable[[random.Random], Item]


@dataclass(frozen=True)
class Task:
    """`train` and `splits` make items out of `vocabulary`: those of `train` have at most `block` tokens, all at most `most`."""

    vocabulary: tuple[str, ...]
    train: Maker
    splits: dict[str, Maker]
    block: int
    most: int


def task_of(args: argparse.Namespace) -> Task:
    if args.task == "counting":
        block = args.block
        train = partial(counting.make, variables=args.variables, max_steps=args.max_steps, block=block)
        longer = partial(counting.make, variables=args.variables, max_steps=2 * args.max_steps, block=2 * block)
        return Task(counting.vocabulary(args.variables), train, {"in distribution": train, "longer": longer}, block, 2 * block)
    splits: dict[str, Maker]
    if args.task == "flipflop":
        splits = {name: partial(flipflop.make, ignore=p, length=args.length) for name, p in flipflop.IGNORE.items()}
        return Task(flipflop.VOCABULARY, splits["in distribution"], splits, args.length, args.length)
    blanks = {name: round(share * args.copied) for name, share in selective_copy.BLANKS.items()}
    splits = {name: partial(selective_copy.make, blanks=count, copied=args.copied) for name, count in blanks.items()}
    sizes = {name: count + 2 * args.copied for name, count in blanks.items()}
    return Task(selective_copy.VOCABULARY, splits["in distribution"], splits, sizes["in distribution"], max(sizes.values()))


# The model. Legend: B rows, T tokens, E hidden width, H heads, D head width, P positions of CoPE.


def rotated(x: Tensor) -> Tensor:
    """x [B, H, T, D] turned by its place, halves paired."""
    tokens, width = x.shape[-2:]
    rates = ROPE_BASE ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(tokens, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Causal attention with one kind of positions. `distances` [block, D]: the relative ones, shared by all layers."""

    def __init__(self, args: argparse.Namespace, positions: str, distances: nn.Parameter | None) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = args.heads, args.scale, args.attention_dropout
        self.rotates, self.distances = "rope" in positions, distances
        self.qkv, self.out = nn.Linear(args.hidden, 3 * args.hidden), nn.Linear(args.hidden, args.hidden)
        if "cope" in positions:
            self.embeddings = nn.Parameter(torch.zeros(args.cope_positions, args.hidden // args.heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        turned = (rotated(q), rotated(k)) if self.rotates else (q, k)
        dropout = self.dropout if self.training else 0.0
        if hasattr(self, "embeddings"):
            given = self.inputs(q, k, v, *turned)
            mixed = whole(given, Sight(tokens, tokens), dropout)[0] if dropout else attend(given, Sight(tokens, tokens))
        elif self.distances is not None:
            bias = self.relative(q, self.distances)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)
        else:
            q, k = turned
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, -1))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor, turned_k: Tensor) -> Inputs:
        """Equations 3 and 7 with what is not rotated: a turned query's position logits would depend on where it stands."""
        scaling = q.shape[-1] ** -0.5
        z = q @ self.embeddings.T * (scaling if self.scale == "code" else 1.0)
        return Inputs(turned_q, turned_k, v, z, q.new_zeros(self.heads), q * scaling, k, scaling=scaling)

    def relative(self, q: Tensor, distances: Tensor) -> Tensor:
        """q_i · r[i - j] / √D, -inf where j > i: [B, H, T, T]. Distances beyond the table are its last."""
        places = torch.arange(q.shape[2], device=q.device)
        apart = places[:, None] - places
        logits = (q @ distances.T).gather(-1, apart.clamp(0, len(distances) - 1).expand(*q.shape[:2], -1, -1))
        return (logits * q.shape[-1] ** -0.5).masked_fill(apart < 0, float("-inf"))


class Layer(nn.Module):
    def __init__(self, args: argparse.Namespace, attention: Attention) -> None:
        super().__init__()
        self.attention, self.post = attention, args.norm == "post"
        self.norms = nn.ModuleList(nn.LayerNorm(args.hidden) for _ in range(2))
        activation = {"relu": nn.ReLU, "gelu": nn.GELU}[args.activation]()
        up, down = nn.Linear(args.hidden, args.feed_forward), nn.Linear(args.feed_forward, args.hidden)
        self.feed_forward = nn.Sequential(up, activation, nn.Dropout(args.dropout), down)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attention, self.feed_forward), strict=True):
            x = norm(x + self.dropout(part(x))) if self.post else x + self.dropout(part(norm(x)))
        return x


class Decoder(nn.Module):
    """Ids [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, args: argparse.Namespace, task: Task, positions: str) -> None:
        super().__init__()
        width = args.hidden // args.heads
        self.tokens = nn.Embedding(len(task.vocabulary), args.hidden)
        nn.init.normal_(self.tokens.weight, std=args.hidden**-0.5)
        self.places = self.distances = None
        if positions == "absolute":
            self.places = nn.Parameter(torch.randn(task.most, args.hidden) * args.hidden**-0.5)
        if positions == "relative":
            self.distances = nn.Parameter(torch.randn(task.block, width) * width**-0.5)
        self.layers = nn.ModuleList(Layer(args, Attention(args, positions, self.distances)) for _ in range(args.layers))
        self.norm = nn.Identity() if args.norm == "post" else nn.LayerNorm(args.hidden)
        self.dropout = nn.Dropout(args.dropout)
        self.head = nn.Linear(args.hidden, len(task.vocabulary), bias=False)
        if not args.untied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places[: ids.shape[1]]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# Data and runs


@dataclass(frozen=True)
class Encoded:
    """One item's ids [T], and which of them are asked for [T]."""

    ids: np.ndarray
    asked: np.ndarray


def items(make: Maker, vocabulary: tuple[str, ...], seed: str) -> Iterator[Encoded]:
    """Items without end, the same for the same seed."""
    draw, number = random.Random(seed), {symbol: index for index, symbol in enumerate(vocabulary)}
    while True:
        item = make(draw)
        asked = np.zeros(len(item.tokens), dtype=bool)
        asked[list(item.answers)] = True
        yield Encoded(np.array([number[token] for token in item.tokens], dtype=np.uint8), asked)


def take(source: Iterator[Encoded], count: int) -> list[Encoded]:
    return [next(source) for _ in range(count)]


def passes(kept: list[Encoded], batch: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches of one random order after the other, without end."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(kept)), len(kept))
        for at in range(0, len(order), batch):
            yield [kept[i] for i in order[at : at + batch]]


def collate(some: list[Encoded], everything: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T - 1] and what comes after each, IGNORED where it is not asked for (or, with `everything`, where nothing is).

    Padding is on the right, where no token that counts looks.
    """
    longest = max(len(one.ids) for one in some)
    ids, wanted = np.zeros((len(some), longest), dtype=np.int64), np.full((len(some), longest), IGNORED)
    for row, one in enumerate(some):
        ids[row, : len(one.ids)] = one.ids
        counts = slice(0, len(one.ids)) if everything else one.asked.nonzero()[0]
        wanted[row, counts] = one.ids[counts]
    return torch.from_numpy(ids[:, :-1]).to(device), torch.from_numpy(wanted[:, 1:]).to(device)


@torch.inference_mode()
def tested(model: Decoder, test: list[Encoded], batch: int, device: torch.device) -> dict[str, float]:
    """Errors in %, of answers and of sequences with any wrong answer, and nats an answer."""
    model.eval()
    answers = wrong = failed = 0
    nats = 0.0
    for at in range(0, len(test), batch):
        ids, wanted = collate(test[at : at + batch], False, device)
        logits = model(ids)
        misses = (logits.argmax(-1) != wanted) & (wanted != IGNORED)
        nats += float(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"))
        answers, wrong = answers + int((wanted != IGNORED).sum()), wrong + int(misses.sum())
        failed += int(misses.any(-1).sum())
    model.train()
    return {"error": 100 * wrong / answers, "sequence_error": 100 * failed / len(test), "nats": nats / answers}


def trained_on(args: argparse.Namespace, task: Task) -> list[Encoded]:
    """The items of the training set, the same for all runs; empty where every step draws new ones."""
    return take(items(task.train, task.vocabulary, "train"), args.train_samples)


def shared_items(args: argparse.Namespace, task: Task) -> dict[str, float]:
    """The share of each split's test items that stand in the training set, token by token."""
    train = {item.ids.tobytes() for item in trained_on(args, task)}
    tests = {name: take(items(make, task.vocabulary, f"test {name}"), args.test_samples) for name, make in task.splits.items()}
    return {name: sum(item.ids.tobytes() in train for item in test) / len(test) for name, test in tests.items()}


def chosen(args: argparse.Namespace, task: Task, positions: str, device: torch.device) -> dict[str, Any]:
    """The learning rate with the fewest errors on items drawn for choosing, and the errors with each."""
    if len(args.learning_rates) < 2:
        return {"learning_rate": args.learning_rates[0], "tried": {}}
    short = argparse.Namespace(**vars(args) | {"train_steps": args.choose_steps})
    runs = {rate: run(short, task, positions, 0, device, rate, "choose") for rate in args.learning_rates}
    errors = {rate: runs[rate]["splits"]["in distribution"]["error"] for rate in runs}
    return {"learning_rate": min(errors, key=lambda rate: errors[rate]), "tried": {f"{r:g}": e for r, e in errors.items()}}


def run(
    args: argparse.Namespace,
    task: Task,
    positions: str,
    seed: int,
    device: torch.device,
    learning_rate: float | None = None,
    part: str = "test",
) -> dict[str, Any]:
    """Train one model and test it on items of `part`, of "choose" on one split alone; at the first learning rate by default."""
    torch.manual_seed(seed)
    model = Decoder(args, task, positions).to(device)
    if args.train_samples:
        batches = passes(trained_on(args, task), args.batch, seed)
    else:
        source = items(task.train, task.vocabulary, f"train {seed}")
        batches = iter(lambda: take(source, args.batch), None)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate or args.learning_rates[0])
    start, losses = time.monotonic(), []
    for step in range(1, args.train_steps + 1):
        ids, wanted = collate(next(batches), args.loss_on == "all", device)
        loss = F.cross_entropy(model(ids).flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % args.told_every == 0 or step == args.train_steps:
            curve = float(torch.stack(losses[-args.told_every :]).mean())
            print(f"{positions} seed {seed} step {step}: loss {curve:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    splits = {}
    for name in task.splits if part == "test" else ("in distribution",):
        test = take(items(task.splits[name], task.vocabulary, f"{part} {name}"), args.test_samples)
        splits[name] = tested(model, test, args.batch, device)
    told = torch.stack(losses).float().cpu().numpy()
    return {
        "positions": positions,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        "losses": [round(float(part.mean()), 5) for part in np.array_split(told, min(20, len(told)))],
        "splits": splits,
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean error of each kind of positions on each split, with its 95 % interval over seeds."""
    rows = []
    for positions in dict.fromkeys(one["positions"] for one in runs):
        own = [one for one in runs if one["positions"] == positions]
        for split in own[0]["splits"]:
            row: dict[str, Any] = {"positions": positions, "split": split}
            for key in ("error", "sequence_error"):
                values = [one["splits"][split][key] for one in own]
                row[key] = mean_interval(np.array(values), np.ones(len(values))).record() | {"values": values}
            rows.append(row)
    return rows


def shown(row: dict[str, Any]) -> str:
    error = row["error"]
    spread = "" if error["low"] is None else f" [{error['low']:.2f}, {error['high']:.2f}]"
    values = ", ".join(f"{value:.2f}" for value in error["values"])
    return f"{row['positions']:10} {row['split']:16} {error['mean']:6.2f} %{spread} ({values})"


DEFAULTS = {"counting": (15_700, 10_000), "flipflop": (10_000, 0), "selective-copy": (15_700, 100_000)}  # steps, samples
NOT_SETTINGS = {"positions", "seeds", "results", "told_every", "device"}


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("task", choices=list(DEFAULTS))
    add("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS), help="what to compare")
    add("--seeds", type=int, default=3, help="runs of each")
    add("--variables", type=int, choices=counting.VARIABLES, default=1, help="counting: variables")
    add("--max-steps", type=int, default=counting.MAX_STEPS, help="counting: most steps of a program")
    add("--block", type=int, help="counting: tokens that are kept, from the right; default: as many as --max-steps")
    add("--length", type=int, default=flipflop.LENGTH, help="flipflop: symbols of a string, an even number")
    add("--copied", type=int, default=selective_copy.COPIED, help="selective copy: tokens to copy, blanks in proportion")
    add("--layers", type=int, default=4, help="layers")
    add("--hidden", type=int, default=256, help="hidden width")
    add("--heads", type=int, default=4, help="heads")
    add("--feed-forward", type=int, default=1024, help="width inside the feed-forward layers")
    add("--activation", choices=("relu", "gelu"), default="relu", help="of the feed-forward layers")
    add("--norm", choices=("post", "pre"), default="post", help="norms after the residual sums, or before each part")
    add("--untied", action="store_true", help="an output matrix of its own")
    add("--dropout", type=float, default=0.1, help="on embeddings, parts' outputs and inside feed-forward layers")
    add("--attention-dropout", type=float, default=0.0, help="on attention weights")
    add("--cope-positions", type=int, help="positions of CoPE; default: one more than training tokens")
    add("--scale", choices=("paper", "code"), default="paper", help="CoPE: q·k/√d + q·e, or (q·k + q·e)/√d")
    add("--learning-rates", type=float, nargs="+", default=[7e-5], help="of Adam, constant: one, or several to choose from")
    add("--choose-steps", type=int, default=500, help="steps with which each of several learning rates is tried")
    add("--batch", type=int, default=64, help="sequences of a step")
    add("--loss-on", choices=("answers", "all"), default="answers", help="which tokens are trained on")
    add("--train-steps", type=int, help="steps; default: 15700, flipflop 10000")
    add("--train-samples", type=int, help="items of the training set, 0: new ones in each step; default: 10000, 0 or 100000")
    add("--test-samples", type=int, default=1000, help="items of each test split")
    add("--told-every", type=int, default=500, help="steps from one line to the next")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--results", type=Path, required=True, help="JSON file to write, or to go on with")
    args = parser.parse_args(words)
    steps, samples = DEFAULTS[args.task]
    args.train_steps = steps if args.train_steps is None else args.train_steps
    args.train_samples = samples if args.train_samples is None else args.train_samples
    args.block = args.block or args.max_steps
    args.cope_positions = args.cope_positions or task_of(args).block + 1
    return args


def main() -> None:
    args = parsed()
    task, device = task_of(args), torch.device(args.device)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    told: dict[str, Any] = {
        "settings": settings,
        "environment": environment() | {"device": args.device},
        "chosen": {},
        "runs": [],
    }
    if args.results.exists():
        before = json.loads(args.results.read_text(encoding="utf-8"))
        if any(before[key] != told[key] for key in ("settings", "environment")):
            raise SystemExit(f"{args.results} holds runs with other settings or of another machine; give another --results")
        told |= {"runs": before["runs"], "chosen": before["chosen"]}
    told["shared_with_train"] = shared_items(args, task)
    done = {(one["positions"], one["seed"]) for one in told["runs"]}
    for positions in args.positions:
        if all((positions, seed) in done for seed in range(args.seeds)):
            continue
        choice = told["chosen"][positions] = told["chosen"].get(positions) or chosen(args, task, positions, device)
        for seed in range(args.seeds):
            if (positions, seed) not in done:
                told["runs"].append(run(args, task, positions, seed, device, choice["learning_rate"]))
                told["summary"] = summary(told["runs"])
                args.results.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for row in summary(told["runs"]):
        print(shown(row))


if __name__ == "__main__":
    main()
