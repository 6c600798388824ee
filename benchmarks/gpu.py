"""Run on a GPU all that waits for one, and write docs/gpu.md: `make gpu`.

It has parts: the tests of tests/gpu, whole steps of small networks and of networks at real sizes
in bfloat16, and a race. Each part is a process of its own. A part that fails is kept with what it
said, and the next one begins. A later call goes on with the parts that are missing, or that failed,
or whose code has changed:

    make gpu PYTHON=python3                       # everything that fits into 25 minutes
    make gpu ARGS="--minutes 9"                   # a share of it, as often as needed
    make gpu ARGS="--wheels wheels"               # with the packages of a folder of wheels
    make gpu ARGS="--dry"                         # the same parts in small on the CPU, kept nowhere

It needs torch and a GPU, and installs nothing. What the machine lacks is left out, and the page
says so. It imports nothing but the standard library: a broken package fails a part alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_packages import unpacked

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu"
PAGE = ROOT / "docs" / "gpu.md"

SAID = 40  # last lines that are kept of what a part that failed has said
LEAST = 15.0  # seconds that have to be left for a part to begin

STEPS = ("SINGD/default", "SINGD/diagonal", "AdamW", "AdamW/fused", "Muon", "SOAP/*")
RACERS = ("SINGD/default", "AdamW", "Muon", "SOAP/*")


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: Of the part, and of the file that keeps how it went.
        command: What runs, behind the interpreter; "{results}" and "{junit}" are filled in.
        minutes: After which it is stopped.
    """

    name: str
    command: tuple[str, ...]
    minutes: float


def _tests(name: str, *given: str, minutes: float = 4.0) -> Part:
    command = "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--junitxml={junit}"
    return Part(name, (*command, "-p", "no:cacheprovider", *given), minutes)


def _bench(name: str, models: Sequence[str], device: str, *given: str, minutes: float) -> Part:
    command = "benchmarks/bench.py", "--no-page", "--results", "{results}", "--device", device
    return Part(name, (*command, "--models", *models, *given), minutes)


def _race(tasks: Sequence[str], device: str, *given: str, minutes: float) -> Part:
    command = "benchmarks/race.py", "--no-page", "--results", "{results}", "--device", device
    return Part("race", (*command, "--workers", "0", "--tasks", *tasks, *given), minutes)


def parts() -> Iterator[Part]:
    """What runs on a GPU, what matters most first."""
    for name in ("frontends", "optimizer", "cupy"):
        yield _tests(f"tests-{name}", f"tests/gpu/test_gpu_{name}.py", minutes=6.0)
    own = "--optimizers", *STEPS, "--steps", "30", "--limit"
    for model in ("gpt2-small", "vit-s"):
        yield _bench(f"steps-{model}", [model], "cuda", *own, "12", minutes=4.0)
    # of the first steps of a kind one is recorded, and one compiled
    compiled = "--optimizers", *STEPS, "SINGD/compiled", "--steps", "100", "--limit", "60"
    yield _bench("steps-gpt", ["gpt"], "cuda", *compiled, minutes=5.0)
    for model in ("mlp", "cnn", "stack", "wide"):
        yield _bench(f"steps-{model}", [model], "cuda", *own, "4", minutes=2.0)
    together = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    for library in ("torch", "cupy", "jax"):
        yield _tests(f"laws-{library}", "tests/gpu/test_gpu_laws.py", "-k", library, *together)
    race = "--optimizers", *RACERS, "--scale", "0.5"
    yield _race(["digits", "transformer"], "cuda", *race, "--minutes", "6", minutes=7.0)


def dry_parts() -> Iterator[Part]:
    """The same on the CPU and in small."""
    yield _tests("tests-frontends", "tests/gpu/test_gpu_frontends.py", "-k", "bfloat16")
    own = "--optimizers", "SINGD/default", "AdamW/fused", "--steps", "1", "--limit", "0.1"
    yield _bench("steps-tiny", ["gpt2-tiny", "vit-tiny"], "cpu", *own, minutes=2.0)
    race = "--optimizers", "SINGD/default", "--scale", "1e-6"
    yield _race(["digits"], "cpu", *race, minutes=2.0)


# ---- a part -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part went.

    Attributes:
        name: Of the part.
        failure: Why it failed, empty if it did not.
        said: The end of what it said, if it failed.
        seconds: How long it took.
        tests: The numbers of tests by outcome, empty of other parts.
        made: What it ran on: the device, the versions of packages and the code of this project, as
            gpu_report.py tells them.
    """

    name: str
    failure: str
    said: list[str]
    seconds: float
    tests: dict[str, int]
    made: dict[str, str]

    def keep(self, folder: Path) -> None:
        """Write it to its file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"part-{self.name}.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def outcomes(folder: Path) -> dict[str, Outcome]:
    """All that are kept, by the name of the part, in the order of the parts."""
    order = [part.name for part in parts()]
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob("part-*.json"))]
    kept.sort(key=lambda entry: order.index(entry["name"]) if entry["name"] in order else -1)
    return {entry["name"]: Outcome(**entry) for entry in kept}


def run(
    part: Part, results: Path, seconds: float, environment: dict[str, str], made: dict[str, str]
) -> Outcome:
    """Run a part for so many seconds at most, and show what it says."""
    start, limit = time.monotonic(), min(seconds, 60.0 * part.minutes)
    with tempfile.TemporaryDirectory() as folder:
        junit, log = Path(folder, "junit.xml"), Path(folder, "log")
        filled = [word.format(results=results, junit=junit) for word in part.command]
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *filled],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
                failure = f"exit status {status}" if status else ""
            except subprocess.TimeoutExpired:
                failure = f"stopped after {limit:.0f} s"
            finally:
                _end(process)
        tests = _counted(junit) if junit.exists() else {}
        lines = log.read_text(errors="replace").splitlines()
    if tests and not failure and not tests["passed"]:
        failure = "no test ran"
    if failure:
        print("\n".join(f"    {line}" for line in lines[-SAID:]), flush=True)
    said = lines[-SAID:] if failure else []
    return Outcome(part.name, failure, said, time.monotonic() - start, tests, made)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it still runs, with those that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _counted(junit: Path) -> dict[str, int]:
    """The numbers of tests by outcome, of pytest's report."""
    from xml.etree import ElementTree  # written by this run

    (suite,) = ElementTree.parse(junit).getroot().iter("testsuite")
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    total = found.pop("tests")
    return {"passed": total - sum(found.values())} | found


# ---- the machine --------------------------------------------------------------------------------


def report(environment: dict[str, str], *given: str) -> str:
    """What gpu_report.py prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), *given]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


# ---- the command --------------------------------------------------------------------------------


def go(chosen: Sequence[Part], results: Path, seconds: float, environment: dict[str, str]) -> bool:
    """Run the parts that are missing; whether all of them are there, and none has failed."""
    deadline = time.monotonic() + seconds
    made: dict[str, str] = json.loads(report(environment, "--made"))
    kept = outcomes(results)
    for part in chosen:
        known = kept.get(part.name)
        if known is not None and not known.failure and known.made == made:
            print(f"{part.name}: is there", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"{part.name}: no time is left for it", flush=True)
            continue
        print(f"{part.name}: begins", flush=True)
        kept[part.name] = found = run(part, results, left, environment, made)
        found.keep(results)
        how = f"FAILED, {found.failure}" if found.failure else "done"
        print(f"{part.name}: {how}, {found.seconds:.0f} s {found.tests or ''}", flush=True)
    missing = [
        part.name for part in chosen if part.name not in kept or kept[part.name].made != made
    ]
    failed = [part.name for part in chosen if part.name in kept and kept[part.name].failure]
    if missing:
        print(f"MISSING: {', '.join(missing)}: run the same command again")
    if failed:
        print(f"FAILED: {', '.join(failed)}: what they said is in {results}, and on the page")
    return not missing and not failed


def main(given: Sequence[str] | None = None) -> int:
    """The command; 0 if every part has run and none has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="of all; start none after")
    parser.add_argument("--only", nargs="+", help="the parts to run, by name")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the machine lacks")
    parser.add_argument("--results", type=Path, default=None, help=f"default: {RESULTS}")
    parser.add_argument("--page", type=Path, default=None, help=f"default: {PAGE}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in small; keeps nothing")
    args = parser.parse_args(given)
    every = list(dry_parts() if args.dry else parts())
    chosen = [part for part in every if args.only is None or part.name in args.only]
    if unknown := set(args.only or ()) - {part.name for part in every}:
        parser.error(f"--only {sorted(unknown)}: there are {[part.name for part in every]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results, page = args.results or RESULTS, args.page or PAGE
        if args.dry:
            results, page = args.results or folder / "results", args.page or folder / "gpu.md"
        paths = [*unpacked(args.wheels, folder), ROOT, ROOT / "frontends", ROOT / "benchmarks"]
        before = os.environ.get("PYTHONPATH")
        more: dict[str, Any] = {
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *([before] if before else [])]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # others want memory too
        }
        if args.dry:
            more |= {"SINGD_GPU_SUBSTITUTE": "1", "OMP_NUM_THREADS": "1"}
        environment = os.environ | more
        if not args.dry:
            report(environment, "--check")
        done = go(chosen, results, 60.0 * args.minutes, environment)
        print(report(environment, "--results", str(results), "--page", str(page)), end="")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
