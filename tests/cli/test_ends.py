"""How a command ends: by a signal, on a terminal of any encoding, with a full disk behind its output."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SIGNS, any_file, call, command, forked, stopped

import backdoorbench_moe
from backdoorbench_moe import cli
from backdoorbench_moe.cli.terminal.streams import STAND_INS
from backdoorbench_moe.records import RunFolder

LONG = ["attack", *SIGNS, "--epochs", "400", "--no-twin"]
FULL = "bbmoe: error: standard output: No space left on device"


def finished(*words: object) -> bool:
    """Whether `bbmoe` comes to its end in a process of its own."""
    with forked(*words) as process:
        return process.end() == 0


def records(output: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(output.glob("*/record.json"))]


def checkpoints(output: Path) -> set[tuple[Path, int]]:
    """The checkpoints of the runs in this folder, with their times."""
    return {(file, file.stat().st_mtime_ns) for file in output.glob("*/checkpoint/state.safetensors")}


def stores_an_epoch(output: Path, *, runs: int = 1) -> Callable[[], bool]:
    """Whether so many runs in this folder have stored an epoch since this call."""
    before = checkpoints(output)
    return lambda: len(checkpoints(output) - before) == runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "code", "name"),
    [
        (signal.SIGTERM, 1, 143, "by SIGTERM"),
        (signal.SIGTERM, 5, 143, "by SIGTERM"),  # As `timeout` and schedulers do.
        (signal.SIGHUP, 1, 129, "by SIGHUP"),
        (signal.SIGINT, 1, 130, "interrupted;"),
    ],
)
def test_an_attack_ended_by_a_signal_is_interrupted(tmp_path, number, times, code, name) -> None:
    words = [*LONG, "--output", tmp_path]
    got, said = stopped(words, any_file(tmp_path, "*/checkpoint/state.safetensors"), number, times=times)
    assert got == code and name in said and "the same command continues it" in said
    assert "Traceback" not in said
    [record] = records(tmp_path)
    assert record["status"] == "interrupted" and 1 <= len(record["history"]) < 400


@pytest.mark.slow
def test_ended_and_called_again_it_has_the_numbers_of_one_call(tmp_path) -> None:
    words = ["attack", *SIGNS, "--epochs", "8", "--no-twin", "--output"]
    code, _ = stopped([*words, tmp_path / "cut"], stores_an_epoch(tmp_path / "cut"))
    assert code == 143
    for output in ("cut", "whole"):
        assert finished(*words, tmp_path / output)
    cut, whole = (records(tmp_path / output)[0] for output in ("cut", "whole"))
    assert cut["metrics"] == whole["metrics"] and cut["status"] == "finished"


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing_and_sigterm_does(tmp_path) -> None:
    """Of the program as a user starts it."""
    process = subprocess.Popen(
        ["nohup", *command(*LONG, "--output", tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    )
    try:
        for number in (signal.SIGHUP, signal.SIGTERM):
            stored = stores_an_epoch(tmp_path)
            while not stored():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()  # It would go on beside the other tests; nothing happens if it has ended.
    assert process.returncode == 143 and b"by SIGTERM" in said and b"Traceback" not in said
    assert records(tmp_path)[0]["status"] == "interrupted"


@pytest.mark.slow
def test_a_defense_and_an_analysis_end_so_too(tmp_path) -> None:
    assert finished("attack", *SIGNS, "--epochs", "1", "--no-twin", "--output", tmp_path)
    [folder] = tmp_path.iterdir()
    words = ["defend", folder, "--defense", "fine-tuning", "--set", "epochs=900", "--set", "clean_fraction=1"]
    code, said = stopped(words, any_file(tmp_path, "*-fine-tuning-*/record.json"))
    assert (code, "by SIGTERM" in said) == (143, True)
    assert [record["status"] for record in records(tmp_path) if record["inputs"]] == ["interrupted"]
    with forked("analyze", folder) as process:
        process.wait_until(lambda: process.said() != "")  # Of what it does now.
        process.send(signal.SIGTERM)
        assert process.end() == 143 and "Traceback" not in process.said()
    assert not (folder / "analysis.json").exists()


SUITE = {
    "title": "Signs",
    "version": 1,
    "base": {
        "recipe": "quick",
        "dataset": {"name": "signs", "train_images": 256, "test_images": 100},
        "model": {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4},
        "train": {"epochs": 400},
        "precision": "fp32",
    },
    "grid": {"applicator": "image", "trigger": "square", "poison.rate": [0.1, 0.2]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "group"), [(signal.SIGTERM, 143, False), (signal.SIGHUP, 129, True)]
)
def test_a_suite_ended_by_a_signal_leaves_no_run_running_or_failed(tmp_path, number, code, group) -> None:
    """To the engine alone, as `kill` does, or to its workers as well, as a closed terminal does."""
    words = write_suite(tmp_path)
    got, said = stopped(words, stores_an_epoch(tmp_path, runs=2), number, times=2, group=group)
    assert got == code and f"by {number.name}" in said and "Traceback" not in said
    assert [record["status"] for record in records(tmp_path)] == ["interrupted"] * 2


@pytest.mark.slow
def test_a_suite_under_nohup_goes_on_when_the_terminal_is_closed_and_ends_by_sigterm(tmp_path) -> None:
    """The workers leave SIGHUP ignored, too. A scheduler sends them SIGTERM as well as the engine."""
    with forked(*write_suite(tmp_path), ignored=[signal.SIGHUP]) as process:
        for number in (signal.SIGHUP, signal.SIGTERM):
            process.wait_until(stores_an_epoch(tmp_path, runs=2))
            process.send(number, group=True)
        assert process.end() == 143 and "by SIGTERM" in process.said()
    # A worker that the first signal had ended would have left a run that failed.
    assert [record["status"] for record in records(tmp_path)] == ["interrupted"] * 2


def write_suite(output: Path) -> list[object]:
    """The command that makes the two runs of a suite side by side."""
    file = output / "mine.yaml"
    file.write_text(json.dumps(SUITE))
    return ["bench", "run", file, "--workers", 2, "--output", output]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A finished run, its twin and a defended one."""
    output = tmp_path_factory.mktemp("runs")
    assert finished("attack", *SIGNS, "--epochs", "1", "--output", output)
    [run] = output.glob("*square*")
    assert finished("defend", run, "--defense", "strip", "--set", "clean_fraction=0.5")
    return output


def all_printing(output: Path) -> list[list[object]]:
    """A call of each command that prints something, of runs that are finished."""
    folders = sorted(output.iterdir())
    [run] = [path for path in folders if "square" in path.name and "strip" not in path.name]
    return [
        ["attack", *SIGNS, "--epochs", "1", "--output", output],
        ["defend", run, "--defense", "strip", "--set", "clean_fraction=0.5"],
        ["analyze", run, "--carriers-images", "10", "--output", output.parent / "analysis"],
        ["show", *folders],
        ["show", run],
        ["show", *folders, "--markdown"],
        ["list"],
        ["info", "trigger", "warp"],
        ["bench", "suites"],
        ["preview", "--run", run, "--images", "2", "--output", output.parent / "preview.png"],
        ["--help"],
    ]


@pytest.fixture
def printing(monkeypatch) -> Callable[..., tuple[int, str]]:
    """Run `bbmoe` in this process, printing to a stream; gives the exit code, and what it said on standard error."""

    def run(words: list[object], stream: io.TextIOWrapper) -> tuple[int, str]:
        said = io.TextIOWrapper(io.BytesIO(), encoding=stream.encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["bbmoe", *map(str, words)])
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", said)
            with pytest.raises(SystemExit) as stop:
                cli.main()
        said.flush()
        return int(stop.value.code or 0), said.buffer.getvalue().decode(stream.encoding)  # type: ignore[attr-defined]

    return run


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
def test_no_command_is_ended_by_the_encoding_of_the_terminal(output, printing) -> None:
    """In the poorest encoding."""
    for words in all_printing(output):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        code, said = printing(words, stream)
        assert code == 0 and "Traceback" not in said, (words, said)
        text = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        assert text.strip(), words
        # Dashes and boxes have a form in any encoding: nothing is a question mark.
        assert "?" not in text.replace("who?", ""), text


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_no_encoding_of_the_terminal_ends_the_program(output, encoding) -> None:
    """Of the program as a user starts it: all commands print through the same stream."""
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for words in (["show", *output.iterdir()], ["show", next(output.glob("*square*"))]):
        done = call(*words, env=env, stdout=subprocess.PIPE)
        assert done.returncode == 0, (words, done.stderr)
        text = done.stdout.decode(encoding)
        assert text.strip() and b"Traceback" not in done.stderr and "?" not in text, words


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
def test_a_file_name_that_is_no_text_can_be_printed(output, tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    shutil.copytree(next(output.glob("*clean*")), folder)
    done = call("show", folder, env={"PYTHONIOENCODING": "utf-8"}, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"r?: finished" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(output, printing) -> None:
    for words in all_printing(output):
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            code, said = printing(words, full)
        assert code == 2 and said.splitlines()[-1] == FULL, words
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line_of_the_whole_program(output) -> None:
    """At its end, Python would write again what it could not write."""
    for words in (["--help"], ["show", *output.iterdir()], ["show", *output.iterdir(), "--json"]):
        with Path("/dev/full").open("wb") as full:
            done = call(*words, stdout=full)
        assert (done.returncode, done.stderr.decode().splitlines()) == (2, [FULL]), words


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_progress_ends_no_run(tmp_path) -> None:
    with Path("/dev/full").open("wb") as full:
        words = command("attack", *SIGNS, "--epochs", "1", "--no-twin", "--output", tmp_path)
        done = subprocess.run(words, stderr=full, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 0 and b"run folder" in done.stdout
    assert records(tmp_path)[0]["status"] == "finished"


@pytest.mark.slow
def test_closed_streams_end_no_run(tmp_path) -> None:
    words = " ".join(map(str, command("attack", *SIGNS, "--epochs", "1", "--no-twin", "--output", tmp_path)))
    done = subprocess.run(f"{words} --json 2>&-", shell=True, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 0 and json.loads(done.stdout)["runs"][0]["status"] == "finished"
    done = subprocess.run(f"{words} >&-", shell=True, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("printing")
def test_a_closed_pipe_is_no_traceback(output) -> None:
    for words in (["show", *output.iterdir()], ["show", *output.iterdir(), "--json"]):
        process = subprocess.Popen(
            command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 1 and said == b""


@pytest.mark.slow
def test_a_killed_run_is_not_shown_as_running(tmp_path, bbmoe) -> None:
    """SIGKILL, a power cut: nothing can be written then."""
    words = [*LONG, "--output", tmp_path]
    when = any_file(tmp_path, "*/checkpoint/state.safetensors")
    code, _ = stopped(words, when, signal.SIGKILL)
    assert code == -signal.SIGKILL
    [folder] = tmp_path.iterdir()
    assert RunFolder(folder).read().status == "running"
    _, shown, _ = bbmoe("show", folder)
    assert ": interrupted" in shown and "running" not in shown


@pytest.mark.slow
def test_a_run_that_runs_is_shown_as_running(tmp_path, bbmoe) -> None:
    with forked(*LONG, "--output", tmp_path) as process:
        process.wait_until(any_file(tmp_path, "*/record.json"))
        [folder] = tmp_path.iterdir()
        assert ": running" in bbmoe("show", folder)[1]


@pytest.mark.slow
def test_every_character_that_is_printed_has_a_stand_in() -> None:
    """Of all texts in the source: which of them are printed changes."""
    found = set()
    for file in Path(backdoorbench_moe.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= {letter for letter in node.value if not letter.isascii()}
    assert "–" in found and found <= STAND_INS.keys()
    assert all(text.isascii() and "?" not in text for text in STAND_INS.values())


MIXTURE = [
    *("attack", "--attack", "moevil", "--experts", "2", "--poisoned-experts", "1", "--policy", "0.1"),
    *("--set", "dataset.train_images=320", "--set", "dataset.test_images=100", "--epochs", "20"),
    *("--set", "model.features=8", "--set", "model.depth=2", "--precision", "fp32", "--device", "cpu"),
    *("--set", "mixture.expert_train.epochs=20", "--set", "mixture.gate_train.epochs=20"),
    *("--set", "attack.epochs=20", "--no-twin"),
]


@pytest.mark.slow
def test_a_mixture_ended_in_each_of_its_parts_has_the_numbers_of_one_call(tmp_path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for part in (
        "*-policy-*/checkpoint/state.safetensors",
        "*-expert0-*/checkpoint/state.safetensors",
        "*-expert1-moevil-*/record.json",
        "*-moe2-*/checkpoint/state.safetensors",
    ):
        code, said = stopped([*MIXTURE, "--output", cut], any_file(cut, part))
        assert code == 143 and "the same command continues it" in said and "Traceback" not in said
        assert [record["status"] for record in records(cut)].count("interrupted") == 1
    for output in (cut, whole):
        assert finished(*MIXTURE, "--output", output)
    pairs = list(zip(records(cut), records(whole), strict=True))
    assert len(pairs) == 5
    for one, other in pairs:
        assert one["status"] == other["status"] == "finished"
        for key in ("digest", "metrics", "gate_shares", "model_sha256", "inputs"):
            assert one[key] == other[key]
