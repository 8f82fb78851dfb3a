"""Do the tests notice when the code is wrong? Changes code in small ways, and runs the tests that run the changed line.

    pip install cosmic-ray pytest-cov
    python -m benchmarks.mutants SCRATCH [--sample 150] [--seed 0] [--kinds] [--tests FILE ...] [--results NAME.json]

Changes are drawn by seed: first a place in the files that carry the load (`mutants.toml`), then one of cosmic-ray's
operators for that place (another comparison, another number, `not`, a loop that never runs ...). What only the type checker
looks at (annotations, assertions, `frozen`, `strict`) is left as it is. `--kinds` makes again, instead, the changes listed in
`mutants.toml`, which tests did not notice once.

A change is caught if a test fails, or hangs; all chosen tests are run without any change first, and have to pass. Which
tests run a line is measured once (coverage.py, a context a test) and kept in SCRATCH, so that the next run of the same commit
begins at once. Of these, tests of the changed file's own room and short ones come first, and as many run as take `--seconds`
together; where nothing is seen to run a line in the tests' own process, those of its function or its file. What changes nothing
that can be seen (an equivalent mutant) is listed with its reason in `mutants.toml`, and told apart.
"""

import argparse
import ast
import difflib
import json
import random
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from benchmarks.mutant_runs import Covering, Runner, copy_checkout, measure_coverage
from upfit.environment import environment

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "benchmarks" / "mutants.toml"
HOUR = 3600.0
LEFT_OUT = ("VariableInserter", "VariableReplacer", "NoOp")  # the first two want names from their user


@dataclass(frozen=True)
class Mutant:
    """One change: `after` is the whole text of `file` (path in the checkout), `lines` those of the old text that it changes."""

    file: str
    name: str
    lines: tuple[int, ...]
    change: str
    after: str


@dataclass(frozen=True)
class Verdict:
    """`outcome`: caught, survived, equivalent. `by`: the test that failed, or why there was none."""

    file: str
    line: int
    name: str
    change: str
    outcome: str
    by: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", action="store_true", help="the changes listed in mutants.toml instead of drawn ones")
    parser.add_argument("--only", help="those kinds whose name holds this")
    parser.add_argument("--seconds", type=float, default=60, help="of tests a change, measured without one (default 60)")
    parser.add_argument("--tests", nargs="+", default=[], help="test files to choose from (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch = args.scratch.resolve()
    args.scratch.mkdir(parents=True, exist_ok=True)
    lists = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    covering = Covering(measure_coverage(ROOT, args.scratch, args.tests, lists["slow"], args.workers))
    mutants = list(kinds(lists["kind"], args.only)) if args.kinds else drawn(lists["files"], args.sample, args.seed)
    verdicts = run_all(mutants, covering, lists.get("equivalent", []), args)
    counts = Counter(verdict.outcome for verdict in verdicts)
    judged = counts["caught"] + counts["survived"]
    summary = {**counts, "score": round(counts["caught"] / max(judged, 1), 3), "seed": None if args.kinds else args.seed}
    print(json.dumps(summary))
    if args.results:
        record = {**summary, "mutants": [asdict(verdict) for verdict in verdicts], "environment": environment()}
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def drawn(patterns: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants: each of a place of its own, all places alike, and of that place one of its mutations."""
    draw = random.Random(seed)
    files = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if not path.name.startswith("test_")})
    places = sorted((str(file.relative_to(ROOT)), place) for file in files for place in _places(file).items())
    mutants: list[Mutant] = []
    for file, (_, mutations) in draw.sample(places, len(places)):
        operator, occurrence = draw.choice(mutations)
        if len(mutants) < count and (mutant := _mutant(file, operator, occurrence)):
            mutants.append(mutant)
    return mutants


def _places(file: Path) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """The (line, column)s of a file that can be mutated, each with its mutations: operator, and which of its occurrences."""
    tree = get_ast(file.read_text(encoding="utf-8"))
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in sorted(operator_names()):
        if name.rpartition("/")[2] in LEFT_OUT:
            continue
        operator, occurrence = get_operator(name)(), 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if not _only_for_readers(node):
                    places.setdefault(start, []).append((name, occurrence))
                occurrence += 1
    return places


def _only_for_readers(node: Any) -> bool:
    """Whether a node is what only the type checker and people look at: in an annotation or an assertion, as which `frozen`
    and `strict` count, or `if TYPE_CHECKING`."""
    if node.type == "assert_stmt" or (node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING"):
        return True
    while node.parent is not None:
        above = node.parent
        if above.type == "annassign" and node is above.children[1]:
            return True
        if above.type == "tfpdef" and node is above.children[-1]:
            return True
        if above.type == "funcdef" and "->" in above.children and node is above.annotation:
            return True
        if above.type == "assert_stmt" or above.get_code().strip() in ("frozen=True", "strict=True"):
            return True
        node = above
    return False


def _mutant(file: str, operator: str, occurrence: int) -> Mutant | None:
    before = (ROOT / file).read_text(encoding="utf-8")
    after = mutate_code(before, get_operator(operator)(), occurrence)
    if not after or ast.dump(ast.parse(after)) == ast.dump(ast.parse(before)):  # 1e30 + 1 is 1e30
        return None
    return _told(file, operator.rpartition("/")[2], before, after)


def kinds(listed: list[dict[str, str]], only: str | None) -> Iterator[Mutant]:
    """The changes of `mutants.toml`: `before`, which stands in `file` once, becomes `after`."""
    for kind in listed:
        if only and only not in kind["name"]:
            continue
        text = (ROOT / kind["file"]).read_text(encoding="utf-8")
        if text.count(kind["before"]) != 1:
            raise SystemExit(f"{kind['name']}: {kind['before']!r} stands {text.count(kind['before'])} times in {kind['file']}")
        yield _told(kind["file"], kind["name"], text, text.replace(kind["before"], kind["after"]))


def _told(file: str, name: str, before: str, after: str) -> Mutant:
    old, new = before.splitlines(), after.splitlines()
    edits = [edit for edit in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if edit[0] != "equal"]
    lines = tuple(number for _, start, end, _, _ in edits for number in range(start + 1, max(end, start + 1) + 1))
    pairs = [(old[start:end], new[low:high]) for _, start, end, low, high in edits]
    change = "; ".join(f"{' '.join(map(str.strip, was))} -> {' '.join(map(str.strip, now))}" for was, now in pairs)
    return Mutant(file, name, lines, change, after)


def run_all(
    mutants: list[Mutant], covering: Covering, equivalent: list[dict[str, str]], args: argparse.Namespace
) -> list[Verdict]:
    """Two checkouts take turns. Prints a line a mutant."""
    reasons = {(entry["file"], entry["change"]): entry["reason"] for entry in equivalent}
    runner = Runner()
    checkouts: Queue[Path] = Queue()
    for number in range(args.workers):
        checkouts.put(copy_checkout(ROOT, args.scratch / f"checkout-{number}"))

    def run(mutant: Mutant) -> Verdict:
        if (mutant.file, mutant.change) in reasons:
            return tell(mutant, "equivalent", reasons[mutant.file, mutant.change])
        tests = covering.tests(mutant.file, mutant.lines, args.seconds)
        if not tests:
            return tell(mutant, "survived", "no test runs it")
        checkout = checkouts.get()
        try:
            failed = runner.changed(checkout, mutant.file, mutant.after, tests, 4 * args.seconds + 60)
        finally:
            checkouts.put(checkout)
        return tell(mutant, "caught" if failed else "survived", failed or f"{len(tests)} tests pass")

    def tell(mutant: Mutant, outcome: str, by: str) -> Verdict:
        print(f"{outcome:10s} {mutant.file}:{mutant.lines[0]} {mutant.name}: {mutant.change[:160]}  [{by}]", flush=True)
        return Verdict(mutant.file, mutant.lines[0], mutant.name, mutant.change, outcome, by)

    with ThreadPoolExecutor(args.workers) as pool, runner:
        chosen = {test for mutant in mutants for test in covering.tests(mutant.file, mutant.lines, args.seconds)}
        if failed := runner.run(args.scratch / "checkout-0", sorted(chosen), HOUR):
            raise SystemExit(f"{failed} without any change: nothing can be said")
        return list(pool.map(run, mutants))


if __name__ == "__main__":
    main()
