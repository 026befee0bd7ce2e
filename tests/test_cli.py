# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, its exit codes, and a sentence instead of a traceback."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fvm_fast
from fvm_fast.build import build_model, build_tokenizer, load_trained, model_spec
from fvm_fast.checkpoint import save_model
from fvm_fast.cli import COMMANDS, main
from fvm_fast.configs import parse_config
from fvm_fast.data.tokenizer import BPETokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model in a file that says how to build it, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    BPETokenizer.from_merges([]).save(folder / "tokenizer.json")
    data = [
        "--data.tokenizer",
        str(folder / "tokenizer.json"),
        "--data.image_size",
        "32",
        "--data.subset",
        "[activities]",
    ]
    config, _ = parse_config([*data, "--model.name", "clip_vit_test", "--run.seed", "5"])
    spec = model_spec(config, build_tokenizer(config.data.tokenizer, 16))
    save_model(folder / "model.safetensors", build_model(spec).state_dict(), spec)
    (folder / "tokenizer.json").unlink()  # the checkpoint carries it
    return folder / "model.safetensors"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fvm-fast {fvm_fast.__version__}\n"


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config", "clip_emoij"], "did you mean 'clip_emoji'?"),
        (["train", "--optimizer.lr", "fast"], "optimizer.lr should be of type float, got fast"),
        (["train", "--data.styles", "[gogle]"], "google"),
        (["train", "--data.tokenizer", "/nowhere.json"], "expected emoji, clip or the path of a tokenizer.json"),
        (["train", "--data.augment", "strong"], "anywhere, photo or aligned, got 'strong'"),
        (["train", "--model.name", "clip_vit_emojo"], "clip_vit_emoji"),
        (["train", "--schedule.steps", "0"], "schedule.steps should be 1 or more, got 0"),
        (["train", "--optimizer.batch_size", "5000"], "between 1 and the number of pairs"),
        (["eval", "--checkpoint", "/nowhere"], "there is no file or run folder /nowhere"),
        (["bench", "flux_capacitor"], "there is no benchmark 'flux_capacitor'"),
        (["data", "describe", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FVM_FAST_DEBUG", raising=False)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert err.startswith(f"fvm-fast {argv[0]}: ")
    assert not list(tmp_path.iterdir())  # nothing half made is left behind


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FVM_FAST_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["eval", "--checkpoint", "/nowhere"])


def test_a_folder_without_a_checkpoint_and_a_foreign_file(tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    assert main(["eval", "--checkpoint", str(tmp_path / "foreign.safetensors")]) == 2
    assert "holds weights but not how to build their model" in capsys.readouterr().err


def test_eval_prints_scores_search_and_figures(checkpoint, tmp_path, capsys):
    out, figures = tmp_path / "scores.json", tmp_path / "figures"
    argv = ["eval", "--checkpoint", str(checkpoint), "--search", "red fruit", "--out", str(out)]
    assert main([*argv, "--figures", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "zero-shot on twitter" in printed and "red fruit: " in printed
    scores = json.loads(out.read_text())["zero_shot"]["twitter"]
    for setting in ("aligned", "anywhere"):
        rows = scores[setting]
        assert list(rows) == ["trained", "raw pixels", "untrained", "chance"]
        assert rows["trained"] == rows["untrained"]  # this checkpoint is its own starting point
        assert rows["chance"]["top10"] == pytest.approx(1000 / 85)
        assert all(row["top1"] <= row["top5"] <= row["top10"] for row in rows.values())
    pixels = {setting: scores[setting]["raw pixels"]["top1"] for setting in scores}
    assert pixels["aligned"] > 40 > 20 > pixels["anywhere"]  # vendors draw alike: no help unless things stand alike
    assert sorted(path.name for path in figures.iterdir()) == ["search.png", "similarity.png"]


def test_train_to_the_figures(tmp_path, capsys):
    out = tmp_path / "run"
    config = tmp_path / "small.yaml"
    config.write_text(
        "data: {subset: [activities], image_size: 32}\nmodel: {name: clip_vit_test}\n"
        "optimizer: {batch_size: 40}\nschedule: {steps: 5}\nrun: {log_every: 1, compare_steps: 2}\n"
        "eval: {styles: [twitter], queries: [ball]}\n"
    )
    assert main(["train", "--config", str(config), "--run.out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "zero-shot on twitter" in printed.out and f"done: {out}" in printed.out
    assert "first 2 steps against a plain open_clip loop" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.yaml", "figures", "metrics.jsonl", "results.json", "train.log",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["loss.png", "search.png", "similarity.png"]
    results = json.loads((out / "results.json").read_text())
    assert results["open_clip"]["loss_difference"] < 1e-4
    assert results["zero_shot"]["twitter"]["anywhere"]["chance"]["top1"] == pytest.approx(100 / 85)
    assert "step 5/5" in (out / "train.log").read_text()

    # the folder alone is enough to look again, and to refuse to be overwritten
    assert main(["eval", "--checkpoint", str(out), "--out", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["zero_shot"] == results["zero_shot"]
    assert main(["train", "--config", str(out / "config.yaml")]) == 2
    assert "already holds a run; continue it with --resume auto" in capsys.readouterr().err


def test_eval_on_pairs_of_ones_own(checkpoint, tmp_path, capsys):
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (40, 60), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name} thing")
    assert main(["eval", "--checkpoint", str(checkpoint), "--style", "--pairs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "image to text" in printed and "100.0" in printed


def test_export_round_trip(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "own.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    torch.testing.assert_close(load_file(out), load_file(checkpoint), rtol=0, atol=0)
    assert load_trained(out).spec["model"] == "clip_vit_test"


def test_export_in_half_precision_loads_again(checkpoint, tmp_path):
    out = tmp_path / "half.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--half", "--out", str(out)]) == 0
    assert {t.dtype for t in load_file(out).values()} == {torch.float16}
    whole, halved = (load_trained(path).model.state_dict() for path in (checkpoint, out))
    torch.testing.assert_close(halved, whole, rtol=1e-3, atol=1e-4)


def test_export_to_another_library(checkpoint, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["export", "--checkpoint", str(checkpoint), "--to", "transformers", "--out", str(out)]) == 0
    names = load_file(out / "model.safetensors").keys()
    assert "visual_projection.weight" in names and "visual.proj" not in names
    assert main(["export", "--checkpoint", str(checkpoint), "--to", "nonsense", "--out", str(out)]) == 2
    assert "got 'nonsense'" in capsys.readouterr().err


def test_describe(capsys):
    assert main(["data", "describe", "emoji3"]) == 0
    printed = capsys.readouterr().out
    assert "EmojiPairs: 2547 images [4, 64, 64]" in printed and "concepts: 849" in printed


def test_core_dependencies_are_enough_for_help_and_a_sentence():
    """Without jsonargparse, rich and matplotlib the commands that need them name the extra to install."""
    hide = "import sys; [sys.modules.__setitem__(m, None) for m in ('jsonargparse', 'rich', 'matplotlib')]; "
    program = hide + "from fvm_fast.cli import main; print(main(['--help']), main(['train']), main(['bench', '-h']))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout.rstrip().endswith("0 2 0"), run.stdout + run.stderr
    assert "pip install 'fvm_fast[train]'" in run.stderr
