"""How a command ends: by a signal, on a terminal of any encoding, with a full disk behind its output."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, SIGNS, any_file, call, command, stopped

import backdoorbench_moe
from backdoorbench_moe.cli.terminal.streams import STAND_INS
from backdoorbench_moe.records import RunFolder

LONG = ["attack", *SIGNS, "--epochs", "400", "--no-twin"]


def records(output: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(output.glob("*/record.json"))]


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
    words = ["attack", *SIGNS, "--epochs", "12", "--no-twin", "--output"]
    code, _ = stopped(
        [*words, tmp_path / "cut"], any_file(tmp_path / "cut", "*/checkpoint/state.safetensors")
    )
    assert code == 143
    for output in ("cut", "whole"):
        assert call(*words, tmp_path / output, stdout=subprocess.DEVNULL).returncode == 0
    cut, whole = (records(tmp_path / output)[0] for output in ("cut", "whole"))
    assert cut["metrics"] == whole["metrics"] and cut["status"] == "finished"


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_so(tmp_path) -> None:
    """Under nohup a closed terminal stops nothing."""
    words = ["attack", *SIGNS, "--epochs", "3", "--no-twin", "--output", tmp_path]
    when = any_file(tmp_path, "*/record.json")
    code, _ = stopped(words, when, signal.SIGHUP, prefix=["nohup"])
    assert code == 0 and records(tmp_path)[0]["status"] == "finished"


@pytest.mark.slow
def test_a_defense_and_an_analysis_end_so_too(tmp_path) -> None:
    assert call("attack", *SIGNS, "--epochs", "1", "--no-twin", "--output", tmp_path).returncode == 0
    [folder] = tmp_path.iterdir()
    words = ["defend", folder, "--defense", "fine-tuning", "--set", "epochs=900", "--set", "clean_fraction=1"]
    code, said = stopped(words, any_file(tmp_path, "*-fine-tuning-*/record.json"))
    assert (code, "by SIGTERM" in said) == (143, True)
    assert [record["status"] for record in records(tmp_path) if record["inputs"]] == ["interrupted"]
    process = subprocess.Popen(
        command("analyze", folder), stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stderr is not None
    assert process.stderr.readline()  # Of what it does now.
    process.send_signal(signal.SIGTERM)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()  # It would go on beside the other tests; nothing happens if it has ended.
    assert process.returncode == 143 and b"Traceback" not in said
    assert not (folder / "analysis.json").exists()


SUITE = {
    "title": "Signs",
    "version": 1,
    "base": {
        "recipe": "quick",
        "dataset": {"name": "signs", "train_images": 640, "test_images": 100},
        "model": {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4},
        "train": {"epochs": 40},
        "precision": "fp32",
    },
    "grid": {"applicator": "image", "trigger": "square", "poison.rate": [0.1, 0.2]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "group"),
    [
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),
        (signal.SIGHUP, 129, True),
    ],
)
def test_a_suite_ended_by_a_signal_leaves_no_run_running_or_failed(tmp_path, number, code, group) -> None:
    """To the engine alone, as `kill` does, or to its workers as well, as a scheduler and a closed terminal do."""
    (tmp_path / "mine.yaml").write_text(json.dumps(SUITE))
    output = tmp_path / "runs"
    words = ["bench", "run", tmp_path / "mine.yaml", "--workers", 2, "--output", output]

    def both() -> bool:
        return len(list(output.glob("*/checkpoint/state.safetensors"))) == 2

    got, said = stopped(words, both, number, times=2, group=group)
    assert got == code and f"by {number.name}" in said and "Traceback" not in said
    assert {record["status"] for record in records(output)} == {"interrupted"}


@pytest.mark.slow
def test_a_suite_under_nohup_goes_on_when_the_terminal_is_closed(tmp_path) -> None:
    """The workers leave SIGHUP ignored, too."""
    short = {**SUITE, "base": {**SUITE["base"], "train": {"epochs": 3}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(short))
    output = tmp_path / "runs"
    words = ["bench", "run", tmp_path / "mine.yaml", "--workers", 2, "--output", output]
    when = any_file(output, "*/record.json")
    code, said = stopped(words, when, signal.SIGHUP, group=True, prefix=["nohup"])
    assert code == 0, said
    assert [record["status"] for record in records(output)] == ["finished"] * 3


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A finished run, its twin and a defended one."""
    output = tmp_path_factory.mktemp("runs")
    assert call("attack", *SIGNS, "--epochs", "1", "--output", output).returncode == 0
    [run] = output.glob("*square*")
    words = ("defend", run, "--defense", "strip", "--set", "clean_fraction=0.5")
    assert call(*words).returncode == 0
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "commands"), [("ascii", None), ("latin-1", ["show", "info"]), ("utf-16", ["show", "info"])]
)
def test_no_encoding_of_the_terminal_ends_a_command(output, encoding, commands) -> None:
    """All commands in the poorest encoding; all print through the same stream, so two of them in the others."""
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for words in all_printing(output):
        if commands is not None and words[0] not in commands:
            continue
        done = call(*words, env=env, stdout=subprocess.PIPE)
        assert done.returncode == 0, (words, done.stderr)
        text = done.stdout.decode(encoding)
        assert text.strip() and b"Traceback" not in done.stderr, words
        # Dashes and boxes have a form in any encoding: nothing is a question mark.
        assert "?" not in text.replace("who?", ""), text


@pytest.mark.slow
def test_a_file_name_that_is_no_text_can_be_printed(output, tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    shutil.copytree(next(output.glob("*clean*")), folder)
    done = call("show", folder, env={"PYTHONIOENCODING": "utf-8"}, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"r?: finished" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(output) -> None:
    for words in all_printing(output):
        with Path("/dev/full").open("wb") as full:
            done = call(*words, stdout=full)
        assert done.returncode == 2, words
        last = done.stderr.decode().splitlines()[-1]
        assert last == "bbmoe: error: standard output: No space left on device"
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


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
def test_a_closed_pipe_is_no_traceback(output) -> None:
    for words in (["list"], ["show", *output.iterdir(), "--json"]):
        process = subprocess.Popen(
            command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 1 and said == b""


@pytest.mark.slow
def test_a_killed_run_is_not_shown_as_running(tmp_path) -> None:
    """SIGKILL, a power cut: nothing can be written then."""
    words = [*LONG, "--output", tmp_path]
    when = any_file(tmp_path, "*/checkpoint/state.safetensors")
    code, _ = stopped(words, when, signal.SIGKILL)
    assert code == -signal.SIGKILL
    [folder] = tmp_path.iterdir()
    assert RunFolder(folder).read().status == "running"
    done = call("show", folder, stdout=subprocess.PIPE)
    assert b": interrupted" in done.stdout and b"running" not in done.stdout


@pytest.mark.slow
def test_a_run_that_runs_is_shown_as_running(tmp_path) -> None:
    process = subprocess.Popen(
        command(*LONG, "--output", tmp_path), stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        while not any(tmp_path.glob("*/record.json")):
            assert process.poll() is None
            time.sleep(0.02)
        [folder] = tmp_path.iterdir()
        assert b": running" in call("show", folder, stdout=subprocess.PIPE).stdout
    finally:
        process.kill()
        process.wait()


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
        assert call(*MIXTURE, "--output", output, stdout=subprocess.DEVNULL).returncode == 0
    pairs = list(zip(records(cut), records(whole), strict=True))
    assert len(pairs) == 5
    for one, other in pairs:
        assert one["status"] == other["status"] == "finished"
        for key in ("digest", "metrics", "gate_shares", "model_sha256", "inputs"):
            assert one[key] == other[key]
