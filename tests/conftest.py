"""Two tiny backbones, and a fixture that runs over every method and both of them."""

import json
import os
from pathlib import Path
from typing import Any

# One thread each: the suite shares two cores with the processes it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hydra
import pytest
import torch
import yaml
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftlab.__main__ import main
from peftlab.backbone import conv1d_to_linear
from peftlab.cards import method_names
from peftlab.config import HOME, resolve
from peftlab.data import Batch
from peftlab.fit import nats_of
from peftlab.method import Method
from peftlab.parts import NOT_ARGUMENTS, construct
from peftlab.run import run
from peftlab.sites import FAMILIES, find_sites
from peftlab.train import CONF

VOCABULARY = 11


def tiny_llama(layers: int = 3) -> LlamaForCausalLM:
    """Grouped-query attention, no biases; widths differ so that shapes cannot be confused."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_gpt2(layers: int = 3) -> GPT2LMHeadModel:
    """Conv1D turned Linear, biases that are not zero, q, k and v in one layer."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    net = GPT2LMHeadModel(config).eval().requires_grad_(False)
    conv1d_to_linear(net)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return net


NETS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def defaults(name: str) -> dict:
    """conf/method/NAME.yaml, with sizes that fit the tiny backbones and no extreme boost."""
    method = yaml.safe_load((HOME / "conf" / "method" / f"{name}.yaml").read_text())
    sizes = {"rank": 4, "r_1": 4, "r_2": 3, "l_1": 2, "l_a": 2, "l_b": 3, "r_u": 3, "r_v": 2}
    sizes |= {"bottleneck": 3, "target_rank": 2, "length": 3, "hidden": 5, "dimension": 96}
    sizes |= {"reduction": 2, "head_width": 4}
    sizes |= {"keep": 0.5}
    gentle = {"gamma": 2.0, "alpha": 2.0}
    return method | {k: v for k, v in (sizes | gentle).items() if k in method}


def make(name: str, net: nn.Module, **changes: object) -> Any:
    """Build method `name` for a tiny backbone; not attached."""
    method = defaults(name) | changes
    torch.manual_seed(3)
    sites = find_sites(net, FAMILIES[net.config.model_type], method["sites"])
    arguments = {k: v for k, v in method.items() if k not in NOT_ARGUMENTS}
    built = construct("method", {"_target_": method["_target_"], **arguments}, sites=sites)
    return built.eval()  # as the backbones are


def attach(method: Method, net: Any) -> None:
    """Attach `method` and let it look at two tiny batches, as a run does before training."""
    method.attach(net)
    ids = torch.randint(VOCABULARY, (2, 2, 9), generator=torch.Generator().manual_seed(5))
    batches = [Batch(row[:, :-1], row[:, 1:], None, row[:, :-1].numel()) for row in ids]
    method.prepare(lambda batch: nats_of(net, batch), batches)


def shake(method: Method, std: float = 0.1) -> None:
    """Move every trainable tensor away from its start: at the identity most laws are vacuous."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p) * std)


@pytest.fixture(params=method_names())
def name(request: pytest.FixtureRequest) -> str:
    """Every method: a new file in conf/method is tested by being there."""
    return request.param


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    """Both architectures."""
    return NETS[request.param]()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of seven tokens."""
    return torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def expect_close():
    """Assert closeness with the tolerance of float32 through three layers."""

    def check(actual, expected, *, atol=1e-5, rtol=1e-4):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)

    return check


ROWS = [
    {"prompt": f"{a} and {b} make ", "completion": f"{a + b}." + " Count again." * (a % 4)}
    for a in range(8)
    for b in range(4)
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Thirty-two short rows with a prompt and a completion."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def compose(rows_file: Path):
    """Resolve the config of a run on tiny_gpt2 and `rows_file`, with more overrides."""

    def make_config(*overrides: str) -> dict:
        small = [
            "model=tiny_gpt2",
            "dataset=local",
            f"dataset.path={rows_file}",
            "dataset.test_size=8",
            "tracking=none",
            "precision=fp32",
            "threads=1",
            "batch=4",
            "epochs=2",
        ]
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return resolve(hydra.compose("config", [*small, *overrides]))

    return make_config


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, runs and cache of `finished`."""
    folder = tmp_path_factory.mktemp("finished")
    rows = ROWS[::2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def finished(session_folder: Path):
    """finished("method=lora", ...) is the folder of a run of one epoch, made once per session."""

    def make_run(*overrides: str) -> Path:
        folder = session_folder / "runs" / "-".join(overrides).replace("=", "_")
        if (folder / "result.json").exists():
            return folder
        small = ["model=tiny_gpt2", "dataset=local", f"dataset.path={session_folder}/rows.jsonl"]
        small += ["dataset.test_size=4", "tracking=none", "precision=fp32", "threads=1"]
        small += ["batch=4", "epochs=1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFTLAB_CACHE", str(session_folder / "cache"))
            with hydra.initialize_config_dir(CONF, version_base="1.3"):
                config = resolve(hydra.compose("config", [*small, *overrides]))
            assert run(config, folder, trial=None, job_type="train")["status"] == "completed"
        return folder

    return make_run


@pytest.fixture
def ask(session_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ask(question, run, ...) is the answer of `peftlab analyze`, read back; rows are dicts."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(session_folder / "cache"))

    def ask_main(*words: object) -> dict:
        file = tmp_path / "answer.json"
        assert main(["analyze", *map(str, words), "-o", str(file)]) == 0
        answer = json.loads(file.read_text())
        heads = [" ".join(filter(None, column.values())) for column in answer["columns"]]
        answer["rows"] = [dict(zip(heads, row, strict=True)) for row in answer["rows"]]
        return answer

    return ask_main


@pytest.fixture
def refused(session_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """refused(word, ...) is the one line in which `peftlab analyze` refuses."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(session_folder / "cache"))

    def refuse(*words: object) -> str:
        capsys.readouterr()
        assert main(["analyze", *map(str, words)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("peftlab: ")
        return line

    return refuse
