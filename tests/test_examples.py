"""examples/train_gpt.py from the outside: what it prints, writes, resumes and refuses. Tiny settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
TINY = "--seq-len 64 --layers 1 --heads 2 --width 16 --batch 2 --memory-lengths 64,128 --threads 1 --checkpoint-every 2"


def train(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the example as a user would, with the package of this checkout, on a terminal 100 wide."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), *map(str, options)]
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)


def results(folder: Path) -> dict:
    """Read the JSON that a run left in its folder."""
    return json.loads((folder / "train_gpt.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run four steps without interruption, checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("train_gpt")
    done = train(*TINY.split(), "--steps", "4", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_run_reports_and_writes_its_results(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    for text in ("loss, first step", "loss, validation", "ms a step", "tokens a second", "peak MiB", "naive", "ours"):
        assert text in done.stdout
    assert "largest difference of loss, ours and naive, first 4 steps" in done.stdout
    assert "def __init__(self" in done.stdout, "the sample starts with its prompt"
    assert (folder / "train_gpt.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    data = results(folder)
    for run in data["runs"].values():
        assert len(run["losses"]) == 4
        assert 3.5 < run["validation_loss"] < 6.0, "four steps leave it near ln(96) = 4.6"
        assert run["median_step_ms"] > 0
        assert run["peak_bytes"] > 0
    assert data["comparison"]["largest_difference"]["ours"] <= 1e-3


def test_measured_memory_is_plausible(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    measured = results(finished[0])["attention_memory"]
    peaks = measured["peak_bytes"]
    for length, naive, ours in zip(measured["lengths"], peaks["naive"], peaks["ours"], strict=True):
        heads, head_dim = 2, 8
        assert naive >= 2 * heads * length**2 * 4, "backward holds the probabilities and their gradient"
        assert ours >= 4 * heads * length * head_dim * 4, "output and three gradients, fp32"
    assert peaks["ours"][-1] < peaks["naive"][-1]


def test_resume_is_bit_identical_and_refuses_another_configuration(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    whole = results(folder)
    for newest in (folder / "checkpoints").glob("*-000004.pt"):
        newest.unlink()  # as if the run had been killed after step 2

    wrong = train(*TINY.split(), "--steps", "4", "--out", folder, "--resume", "--width", "32", "--seed", "7")
    assert wrong.returncode == 1
    assert "checkpoint of another configuration: width was 16, is 32; seed was 0, is 7" in wrong.stderr

    resumed = train(*TINY.split(), "--steps", "4", "--out", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name, run in results(folder)["runs"].items():
        for key in ("losses", "validation_loss"):
            assert run[key] == whole["runs"][name][key], f"{name}: {key}"
    assert results(folder)["sample"] == whole["sample"]


def test_option_errors_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: each case ends before any work, and an interpreter that imports torch for each would be slow.
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import train_gpt

    cases = {
        "--width 30 --heads 4": "--width 30 does not divide into --heads 4: take a multiple, such as 28 or 32",
        "--width 12 --heads 4": "gives a head dimension of 3; rotary embedding turns pairs, so it must be even",
        "--device cuda": "Use --device cpu",
        "--steps 0": "--steps is 0, must be at least 1",
        "--attention naive,flash": "--attention naive,flash: name each of naive, ours, sdpa at most once",
        "--memory-lengths 64,x": "--memory-lengths 64,x: expected positive numbers",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit) as end:
            train_gpt.main(options.split())
        assert end.value.code == 2, options
        assert message in " ".join(capsys.readouterr().err.split()), options

    with pytest.raises(SystemExit, match="--resume: no checkpoint in"):
        train_gpt.main(["--resume", "--out", str(tmp_path)])


def test_curves_that_part_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_gpt

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: object) -> torch.Tensor:
        return 1.5 * train_gpt.naive_attention(q, k, v, **others)

    monkeypatch.setitem(train_gpt.ATTENTIONS, "ours", wrong)
    # Not `--threads 1`: in this process it would outlive the test.
    with pytest.raises(SystemExit, match=r"differ by more than 0.001 over the first 3 steps \(ours and naive by"):
        train_gpt.main([*TINY.replace("--threads 1", "").split(), "--steps", "3", "--out", str(tmp_path)])
    assert (tmp_path / "train_gpt.json").exists(), "the evidence is written before the verdict"
