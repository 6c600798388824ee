"""`make gpu` goes on when a part fails, says so, and goes on where it stopped; its page is true."""

import fnmatch
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAILS = "import sys; print('what went wrong'); sys.exit(3)"


@pytest.fixture
def gpu(monkeypatch):
    """`benchmarks/gpu.py`, on a device that is made up."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    made = {"device": "a made-up GPU", "type": "cuda", "code": "abc", "jax": "0.11"}
    monkeypatch.setattr(module, "report", lambda environment, *given: json.dumps(made))
    return module


def part(gpu, name, code="pass", minutes=1.0):
    return gpu.Part(name, ("-c", code), minutes)


def test_a_part_that_fails_is_told_and_the_next_one_runs(gpu, tmp_path, capsys):
    chosen = [part(gpu, "first", FAILS), part(gpu, "second")]
    assert not gpu.go(chosen, tmp_path, 60.0, {})
    found = gpu.outcomes(tmp_path)
    assert found["first"].failure == "exit status 3"
    assert found["first"].said == ["what went wrong"]
    assert not found["second"].failure
    assert "FAILED: first" in capsys.readouterr().out


def test_a_later_run_makes_what_failed_or_is_missing_or_of_other_code(gpu, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    count = f"open({str(ran)!r}, 'a').write('x')"
    chosen = [part(gpu, "counted", count), part(gpu, "failing", FAILS)]
    assert not gpu.go(chosen, tmp_path, gpu.LEAST - 1.0, {})  # no time is left for any
    assert not gpu.outcomes(tmp_path)
    assert not gpu.go(chosen, tmp_path, 60.0, {})
    chosen[1] = part(gpu, "failing")
    assert gpu.go(chosen, tmp_path, 60.0, {})
    assert ran.read_text() == "x"
    monkeypatch.setattr(gpu, "report", lambda *_: json.dumps({"device": "x", "code": "other"}))
    assert gpu.go(chosen[:1], tmp_path, 60.0, {})
    assert ran.read_text() == "xx"


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_began(gpu, tmp_path):
    alive = tmp_path / "alive"
    later = f"import time; time.sleep(1); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {later!r}])"
    assert not gpu.go([part(gpu, "slow", code, minutes=0.3 / 60)], tmp_path, 60.0, {})
    assert gpu.outcomes(tmp_path)["slow"].failure == "stopped after 0 s"
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1.2)"], check=True)
    assert not alive.exists()


def test_tests_that_all_skip_are_a_failure(gpu, tmp_path):
    report = '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>'
    code = f"import sys; open(sys.argv[1], 'w').write({report!r})"
    skipping = gpu.Part("skipping", ("-c", code, "{junit}"), 1.0)
    assert not gpu.go([skipping], tmp_path, 60.0, {})
    assert gpu.outcomes(tmp_path)["skipping"].failure == "no test ran"


def test_what_the_machine_lacks_is_found_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    packages = importlib.import_module("gpu_packages")
    find = packages.find
    monkeypatch.setattr(
        packages, "find", lambda name: None if name == "array_api_compat" else find(name)
    )
    monkeypatch.setattr(packages, "_version", lambda copy: (1, 14))
    (folder,) = packages.unpacked(None, tmp_path)
    code = (
        "import array_api_compat as c, numpy; print(c.__file__); c.array_namespace(numpy.ones(1))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": f"{folder}:{find('numpy').parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(folder)
    assert "wait" not in capsys.readouterr().out
    monkeypatch.setattr(packages, "_version", lambda copy: (1, 13))
    packages.unpacked(None, tmp_path / "old")
    assert "steps wait for the GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no wheel in it"):
        packages.unpacked(tmp_path / "empty", tmp_path)


def test_the_parts_name_what_there_is(gpu):
    problems, optimizers = (
        importlib.import_module("problems"),
        importlib.import_module("optimizers"),
    )
    for one in [*gpu.parts(), *gpu.dry_parts()]:
        files = [word for word in one.command if word.endswith(".py")]
        assert files, one
        assert all((ROOT / name).exists() for name in files)
        if one.name.startswith("steps-"):
            named = [word for word in one.command if word in problems.PROBLEMS]
            assert one.name == "steps-tiny" or named == [one.name.removeprefix("steps-")]
    assert all(fnmatch.filter(optimizers.ENTRIES, pattern) for pattern in (*gpu.STEPS, *gpu.RACERS))
    assert sum(one.minutes for one in gpu.parts()) < 60.0


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_says_what_the_results_say(gpu, tmp_path):
    report = importlib.import_module("gpu_report")
    page = Path(shutil.copy(gpu.PAGE, tmp_path))
    report.publish(gpu.RESULTS, page)
    assert page.read_text() == gpu.PAGE.read_text()
    ran = any(report.is_gpu(outcome) for outcome in gpu.outcomes(gpu.RESULTS).values())
    assert (report.NOBODY in page.read_text()) != ran


def test_the_page_shows_failures(gpu, tmp_path):
    report = importlib.import_module("gpu_report")
    gpu.go([part(gpu, "first", FAILS), part(gpu, "second")], tmp_path, 60.0, {})
    text = report.publish(tmp_path, tmp_path / "gpu.md")
    assert "Run on a made-up GPU, jax 0.11." in text
    assert "**1 of 2 parts FAILED: first.**" in text
    assert "```text\nwhat went wrong\n```" in text
    assert report.NOBODY not in text


@pytest.mark.slow
def test_the_dry_run_has_no_failures(tmp_path):
    page = tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--results", tmp_path, "--page", page]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "**No GPU has run this yet.**" in text
    assert re.search(r"\| tests-frontends \| done \| 1 passed \|", text)
    assert text.count("| AdamW/fused |") == 2
    assert "| SINGD/default | 50 |" in text
