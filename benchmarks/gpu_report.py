"""The page docs/gpu.md that gpu.py makes of its results, and the machine it runs on."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import curves
import race_report
import steps
import torch
from gpu import PAGE, RESULTS, ROOT, STEPS, Outcome, outcomes
from optimizers import ENTRIES
from pages import digits, environment, table, write
from problems import PROBLEMS
from run_store import SOURCES, fingerprint
from steps import Row
from steps_report import cells

PACKAGES = ("jax", "cupy", "numpy", "triton")
BASE = "AdamW/fused"
COLUMNS = (
    *("optimizer", "T", f"step, of {BASE}'s", "refresh, ms", "other, ms"),
    *("`step()` of a refresh, ms", "`step()` of another, ms", "state, MiB", "peak, MiB"),
)
NOBODY = (
    "**No GPU has run this yet.** The code for accelerators is tested on CPUs alone: on devices "
    "that stand in their place, and by the number of its kernels."
)


def made() -> dict[str, str]:
    """What a part runs on: the device, the versions of packages and the code of this project."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = importlib.metadata.packages_distributions()
    versions = {
        name: importlib.metadata.version(known[name][0]) for name in PACKAGES if name in known
    }
    code = fingerprint((*SOURCES, ROOT / "tests" / "gpu"))
    return {"device": environment(device), "type": device.type, "code": code} | versions


def publish(results: Path, page: Path) -> str:
    """Write the page's generated part, and return it."""
    text = "\n\n".join(said(outcomes(results), steps.load(results), results))
    if not page.exists():  # of a dry run
        page.write_text(PAGE.read_text())
    write(page, "make gpu", text)
    return text


def said(found: dict[str, Outcome], rows: list[Row], results: Path) -> Iterator[str]:
    """The paragraphs."""
    devices = sorted({_words(outcome.made) for outcome in found.values()})
    if not any(is_gpu(outcome) for outcome in found.values()):
        yield NOBODY
    if not found:
        return
    yield "Run on " + "; ".join(devices) + "."
    failed = [outcome for outcome in found.values() if outcome.failure]
    if failed:
        names = ", ".join(outcome.name for outcome in failed)
        yield f"**{len(failed)} of {len(found)} parts FAILED: {names}.**"
    yield table(("part", "", "tests", "seconds"), map(_line, found.values()), words=3)
    for outcome in failed:
        text = "\n".join(outcome.said)
        yield f"**{outcome.name}**, {outcome.failure}:\n\n```text\n{text}\n```"
    for problem in PROBLEMS:
        mine = [row for row in rows if row.problem == problem]
        if mine:
            yield f"**{PROBLEMS[problem].title}**"
            yield table(COLUMNS, of_problem(mine))
    wanted = [n for n in ENTRIES if any(fnmatch.fnmatchcase(n, pattern) for pattern in STEPS)]
    absent = [name for name in wanted if rows and name not in {row.optimizer for row in rows}]
    if absent:
        yield "Not measured: " + ", ".join(absent) + "."
    raced = curves.load(results)
    if complete := race_report.complete(raced):
        yield from race_report.tables(raced, complete)


def is_gpu(outcome: Outcome) -> bool:
    """Whether a part ran on a GPU."""
    return outcome.made["type"] != "cpu"


def of_problem(rows: list[Row]) -> Iterator[list[str]]:
    """The rows of a network's table."""
    base = next((row for row in rows if row.optimizer == BASE), None)
    for row in rows:
        name, T, _, *others = cells(row)
        yield [name, T, "" if base is None else digits(row.ratio / base.ratio), *others[:6]]


def _words(made: dict[str, str]) -> str:
    versions = [f"{name} {version}" for name, version in made.items() if name in PACKAGES]
    return ", ".join([made["device"], *versions])


def _line(outcome: Outcome) -> list[str]:
    tests = ", ".join(f"{n} {name}" for name, n in outcome.tests.items() if n)
    return [outcome.name, outcome.failure or "done", tests, f"{outcome.seconds:.0f}"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--made", action="store_true", help="print what the parts would run on")
    parser.add_argument("--check", action="store_true", help="that there is a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.made:
        print(json.dumps(made()))
    elif args.check:
        if not torch.cuda.is_available():
            sys.exit(f"torch {torch.__version__} finds no GPU: --dry tries the parts on the CPU")
    else:
        print(publish(args.results, args.page))


if __name__ == "__main__":
    main()
