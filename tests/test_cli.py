"""The command itself: bad input is one line and exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import tiny_llama
from transformers import BloomConfig, BloomForCausalLM

from peftlab.__main__ import main
from peftlab.cards import method_names
from peftlab.config import HOME

SMALL = [
    "model=tiny_gpt2",
    "dataset=local",
    "dataset.test_size=8",
    "tracking=none",
    "precision=fp32",
    "threads=1",
    "epochs=1",
]
BAD = {
    # what the user types -> what the line must name: key, value, and something that is allowed
    "epochz=1": ("epochz=1", "epochs"),
    "+foo=1": ("foo=1", "epochs"),
    "method.rnak=4": ("method.rnak=4", "did you mean rank"),
    "+method.foo=1": ("method=", "foo"),
    "+model.foo=1": ("model.foo=1", "kinds"),
    "+optimizer.foo=1": ("optimizer=", "foo"),
    "+dataset.foo=1": ("dataset.foo=1", ""),
    "method=lorra": ("method/lorra", "lora"),
    "model=gpt5": ("model/gpt5", "tiny_gpt2"),
    "dataset=nothing": ("dataset/nothing", "bfcl"),
    "optimizer=adam": ("optimizer/adam", "adamw"),
    "method.rank=0": ("method.rank=0", "from 1"),
    "method.rank=-3": ("method.rank=-3", "from 1"),
    "method.rank=100000": ("method.rank=100000", "smaller side"),
    "method.rank=2.5": ("method.rank=2.5", "whole number"),
    "method.alpha=0": ("method.alpha=0", "above 0"),
    "method.gamma=nan": ("method.gamma=nan", "above 0"),
    "method.gamma=many": ("method.gamma=many", "number"),
    "method.random_factor=C": ("method.random_factor=C", "A or B"),
    "method.dropout=1": ("method.dropout=1", "[0, 1)"),
    "method.sites=[q]": ("method.sites=q", "qkv"),
    "method.sites=[]": ("method.sites=[]", "all"),
    "optimizer.lr=-1": ("optimizer.lr=-1", "above 0"),
    "optimizer.lr=fast": ("optimizer.lr=fast", "number"),
    "optimizer.weight_decay=-1": ("optimizer.weight_decay=-1", "at least 0"),
    "optimizer.schedule=step": ("optimizer.schedule=step", "cosine"),
    "optimizer.warmup=1": ("optimizer.warmup=1", "below 1"),
    "optimizer.clip=0": ("optimizer.clip=0", "above 0"),
    "optimizer.betas=[0.9,2]": ("optimizer=torch.optim.AdamW", "beta"),
    "epochs=0": ("epochs=0", "at least 1"),
    "seed=-1": ("seed=-1", "at least 0"),
    "batch=0": ("batch=0", "at least 1"),
    "~method.lr": ("method.lr", "not found"),
    "~method.sites": ("method.sites=nothing", "a key that every method has"),
    "dataset.block_length=null": ("dataset.block_length=None", "a whole number, at least 2"),
    "micro_batch=99": ("micro_batch=99", "at most batch"),
    "threads=0": ("threads=0", "at least 1"),
    "precision=fp8": ("precision=fp8", "bf16"),
    "model.device=tpu": ("model.device=tpu", "cpu"),
    "model.attention=none": ("model.attention=none", "eager"),
    "model.kinds={q: nope}": ("model.kinds.q=nope", "ends so"),
    'dataset.template="Q {question}"': ("question", "prompt"),
    "dataset.template=Q {question}": ("dataset.template=Q {question}", "quote"),
    "dataset.template=no field": ("dataset.template", "field"),
    "dataset.loss_on=answers": ("dataset.loss_on=answers", "completion"),
    "dataset.block_length=1": ("dataset.block_length=1", "2"),
    "dataset.test_size=0": ("dataset.test_size=0", ""),
    "dataset.train_size=1000": ("dataset.train_size=1000", ""),
    "dataset.path=nowhere.jsonl": ("dataset.path=nowhere.jsonl", ""),
    "dataset.source=moon": ("dataset.source=moon", "local"),
    "tracking.mode=loud": ("tracking", "mode"),
    "output=/sys/peftlab": ("/sys/peftlab", ""),
    "method.rank=": ("method.rank", ""),
    "method.rank={": ("method.rank={", ""),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake, rows_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["train", *SMALL, f"dataset.path={rows_file}", mistake]
    code = main(words)
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert code == 2, captured
    assert len(lines) == 1 and not captured.out, captured
    assert lines[0].startswith("peftlab: ") and "Traceback" not in lines[0]
    for part in BAD[mistake]:
        assert part in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl", "outputs"}
    if (tmp_path / "outputs").exists():
        assert not any((tmp_path / "outputs").iterdir())


def bad_folders(folder):
    """Models and data that are there but no good: name -> override, words of the line."""
    tiny_llama().save_pretrained(folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(
        folder / "bloom"
    )
    for file in (HOME / "peftlab" / "assets" / "tiny_gpt2").glob("tokenizer*"):
        shutil.copy(file, folder / "bloom")
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "rows.xyz").write_text("a")
    return {
        f"model.path={folder / 'cut'}": ("model.path=", "cannot be loaded"),
        f"model.path={folder / 'bloom'}": ("model.kinds=null", "bloom"),
        f"model.path={folder / 'gone'}": ("model.path=", "folder that exists"),
        f"dataset.path={folder / 'empty.jsonl'}": ("dataset.path=", ""),
        f"dataset.path={folder / 'torn.jsonl'}": ("dataset.path=", ""),
        f"dataset.path={folder / 'rows.xyz'}": ("dataset.path=", "jsonl"),
    }


def test_bad_folders_and_files(rows_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for mistake, parts in bad_folders(tmp_path).items():
        model = ["model=hub"] if mistake.startswith("model") else []
        capfd.readouterr()
        code = main(["train", *SMALL, *model, f"dataset.path={rows_file}", mistake])
        lines = capfd.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1, lines
        assert all(part in lines[0] for part in parts), lines
    assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").iterdir())


def test_corrupt_download(rows_file, tmp_path, monkeypatch, capfd):
    """A wheel whose bytes are not the pinned ones is refused and not kept."""
    from peftlab import packages

    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    wrong = packages.PACKAGES["chatterbot"]._replace(sha256="0" * 64)
    monkeypatch.setitem(packages.PACKAGES, "chatterbot", wrong)
    monkeypatch.chdir(tmp_path)
    small = [word for word in SMALL if not word.startswith("dataset")]
    assert main(["train", *small, "dataset=chatterbot"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "chatterbot-corpus==1.3.3: sha256 is 86de" in last and "must be 0000" in last
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_full_error_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="method.rank=0"):
        main(["train", *SMALL, "dataset=pydoc", "dataset.test_size=2", "method.rank=0"])


def test_a_run_and_a_sweep_through_the_command(rows_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, f"dataset.path={rows_file}"]
    assert main(["train", *words]) == 0
    out = capfd.readouterr().out
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("tiny_gpt2-gamma_lora-local-")
    for text in (
        "base model",
        "perplexity",
        "trained parameters",
        "tokens/s",
        "peak memory",
        "merge error",
        f"results: outputs/{folder.name}",
        "try next: peftlab train",
    ):
        assert text in out
    assert main(["train", "-m", *words, "+sweeps=lr", "optimizer.lr=1e-4,1e-3"]) == 0
    study = tmp_path / "outputs" / "lr-gamma_lora-tiny_gpt2-local"
    results = [json.loads((study / n / "result.json").read_text()) for n in ("0", "1")]
    assert [r["optimizer"]["lr"] for r in results] == [1e-4, 1e-3]
    assert [r["trial"] for r in results] == [0, 1] and results[0]["study"] == study.name
    capfd.readouterr()
    assert main(["train", "-m", *words, "+sweeps=lr", "optimizer.lr=1e-4,1e-3"]) == 0
    assert "trial" not in capfd.readouterr().err  # both are there


def test_sigterm_and_the_same_command_again(rows_file, tmp_path):
    """In a process of its own: exit code 143, then the same words go on and finish."""
    words = [sys.executable, "-m", "peftlab", "train", *SMALL, f"dataset.path={rows_file}"]
    words += ["epochs=60", "batch=2"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in rest
    (folder,) = (tmp_path / "outputs").iterdir()
    assert (folder / "checkpoint" / "state.safetensors").exists()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"


def test_help_and_methods(capsys):
    assert main([]) == 0
    assert "peftlab train" in capsys.readouterr().out
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name[:12] in listed for name in method_names())
    assert main(["methods", "tied_lora"]) == 0
    card = capsys.readouterr().out
    assert "W' = W + s diag(v) B diag(u) A" in card and "rank: 16" in card
    assert main(["methods", "nothing"]) == 2
    assert "method=nothing: one of " in capsys.readouterr().err


def test_words_that_need_no_torch_do_not_import_it():
    for words in ([], ["methods"], ["--version"]):
        code = "import sys; from peftlab.__main__ import main\n"
        code += f"try: main({words})\nexcept SystemExit: pass\n"
        code += "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_train_help_is_hydras(tmp_path):
    words = [sys.executable, "-m", "peftlab", "train", "--cfg", "job"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert shown.returncode == 0 and "gamma: 750.0" in shown.stdout, shown.stderr
    assert not any(tmp_path.iterdir())
