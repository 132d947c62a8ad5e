"""The benchmarks run, and compare the same thing; how fast they are is no test."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from morebench.config.compose import ROOT, save_config
from morebench.config.schema import Step

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize("step", [Step.pretrain, Step.finetune])
def test_both_sides_of_the_train_step_learn_alike(step: Step, cell_folder: Path) -> None:
    import train_step

    ours = train_step.run(cell_folder, step, "ours", 1, 2)
    stock = train_step.run(cell_folder, step, "stock", 1, 2)
    assert ours["supervised"] == stock["supervised"]
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
    assert len(ours["seconds"]) == len(stock["seconds"]) == 3
    assert ours["losses"][0] != ours["losses"][-1]


@pytest.fixture(scope="module")
def cell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it; the extra `dev` installs it")
    from train_step_cell import QUICK, make_cell

    root = tmp_path_factory.mktemp("cell")
    config = make_cell(root, replace(QUICK, vocabulary=512), steps=3)
    save_config(config, root / "config.yaml")
    return root


def test_step_at_true_shapes_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gpu_step

    options = ["--tiny", "--device", "cpu", "--steps", "1", "--tokens", "128", "trainer.threads=1"]
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *options, "--profile", str(tmp_path / "table")])
    gpu_step.main()
    out = capsys.readouterr().out
    assert out.count("  ours: trainer.attention=loop, loss_kernel=torch, compile=False, ") == len(
        gpu_step.CASES
    )
    assert out.count("  transformers, 32 samples at a time: ") == len(gpu_step.CASES) - 1
    assert out.count("LLM forward ") == out.count(", backward ") == len(gpu_step.CASES)
    assert "relative error 0.0e+00, of gradients 0.0e+00" in out
    assert all("aten::mm" in (tmp_path / f"table.{name}.txt").read_text() for name in gpu_step.CASES)


def test_all_sides_of_generation_answer_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import generate
    import generate_suite

    options = ["--shape", "test", "--grid", "25", "--images", "1", "--pairs", "1", "--few", "9"]
    monkeypatch.setattr(generate_suite, "REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["generate.py", *options, "--suite"])
    generate.main()
    out = capsys.readouterr().out
    assert "25 visual tokens: 32 questions about each of 1 images" in out
    assert "against alone: 0 of 9 answers differ" in out
    assert "against transformers: 0 of 9 answers differ" in out
    assert "bf16, shared against alone: " in out
    assert "LLaVA-MORE: 61,605 questions about 20,057 images take " in out


def test_only_near_ties_may_change_an_answer() -> None:
    import generate

    ours = [generate.Answer(text, 1, 0, near_ties, True) for text, near_ties in (("a", 0), ("b", 1))]
    told = generate.differences(ours, ["a", "c"], is_exact=True)
    assert told == "1 of 2 answers differ, all after near ties (1)"
    assert generate.differences(ours, ["b", "c"], is_exact=False) == "2 of 2 answers differ"
    with pytest.raises(SystemExit, match="1 answers differ without a near tie, such as 'a', 'c'"):
        generate.differences(ours, ["c", "c"], is_exact=True)
