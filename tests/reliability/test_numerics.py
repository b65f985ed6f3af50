"""The edges of sizes and types: each number against float64, by another way."""

import json
import math

import pytest
import torch
from conftest import NETS, ROWS, VOCABULARY, attach, make, shake
from faults import last_line, quiet
from transformers import AutoModelForCausalLM

from peftlab.__main__ import main
from peftlab.bits import IGNORE, linear_nll
from peftlab.config import HOME
from peftlab.data import Batch
from peftlab.fit import evaluate, nats_of
from peftlab.parts import assemble
from peftlab.run import run

TINY = HOME / "peftlab" / "assets" / "tiny_gpt2"
LIMIT = 256  # positions of tiny_gpt2


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64).eval()


def bits_of(plain, split):
    """Bits per token of a split, row by row, in float64: no padding, no batch, no loss of ours."""
    nats, n = 0.0, 0
    with torch.no_grad():
        for example in split.examples:
            log_p = plain(example.ids[None].long()).logits[0].log_softmax(-1)
            scored = example.targets != IGNORE
            picked = example.targets[scored].long()[:, None]
            nats -= log_p[scored].gather(1, picked).sum().item()
            n += int(scored.sum())
    return nats / n / math.log(2)


@pytest.fixture
def go(compose, tmp_path, plain):
    """Run; check the base against float64 and what must hold of any result."""

    def check(*words, rel=1e-5):
        config = compose("epochs=1", *words)
        with quiet():
            result = run(config, tmp_path / "run", trial=None, job_type="train")
            data = assemble(config).data
        assert result["status"] == "completed" and result["merge"]["ok"]
        for split in ("train", "test"):
            ours = result["base"][f"{split}_bits_per_token"]
            assert ours == pytest.approx(bits_of(plain, getattr(data, split)), rel=rel)
            assert math.isfinite(result["final"][f"{split}_bits_per_token"])
        return result, data

    return check


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 64])
def test_precisions_and_batches(go, precision, batch):
    result, data = go(
        *("method=lora", f"precision={precision}", f"batch={batch}", "dataset.test_size=1"),
        rel=1e-5 if precision == "fp32" else 2e-2,
    )
    assert data.n_steps == (len(ROWS) - 1 if batch == 1 else 1)
    losses = [result[key]["train_bits_per_token"] for key in ("base", "final")]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("rank", [1, 192])
def test_rank_one_and_full(go, rank):
    result, _ = go("method=lora", f"method.rank={rank}", "method.alpha=2", "method.lr=1e-4")
    sides = [(192, 576), (192, 192), (192, 768), (768, 192)]
    assert result["method"]["trainable_params"] == 4 * rank * sum(a + b for a, b in sides)
    losses = [result[key]["train_bits_per_token"] for key in ("base", "final")]
    assert losses[1] < losses[0]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"dataset.path={path}"


def test_rows_of_one_position_and_of_all_that_the_model_has(go, tmp_path):
    texts = ["a", "b", "c", "long word " * 400, "d"]
    words = write(tmp_path / "rows.jsonl", texts), "dataset.test_size=2", "dataset.loss_on=all"
    _, data = go(*words, f"dataset.block_length={LIMIT}", "method=lora", "batch=2")
    lengths = sorted(len(e.ids) for split in (data.train, data.test) for e in split.examples)
    assert lengths == [1, 1, 1, 1, LIMIT]


def test_rows_longer_than_the_model_are_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["train", "model=tiny_gpt2", "dataset=local", "tracking=none", "dataset.test_size=1"]
    words += [write(tmp_path / "rows.jsonl", ["long word " * 400, "b"])]
    assert main([*words, f"dataset.block_length={LIMIT + 1}"]) == 2
    last_line(capfd.readouterr(), f"dataset.block_length={LIMIT + 1}: at most {LIMIT}")


def test_one_row_to_train_and_one_to_test(go, tmp_path, capfd, monkeypatch):
    file = write(tmp_path / "rows.jsonl", ["only this one", "and that"])
    result, data = go(file, "dataset.test_size=1", "method=lora", "batch=64")
    assert (len(data.train.examples), len(data.test.examples), data.n_steps) == (1, 1, 1)
    monkeypatch.chdir(tmp_path)
    words = ["train", "model=tiny_gpt2", "dataset=local", "tracking=none"]
    file = write(tmp_path / "one.jsonl", ["only this one"])
    for size in ("1", "0.1"):
        assert main([*words, file, f"dataset.test_size={size}"]) == 2
        last_line(capfd.readouterr(), "dataset.t", "_size=")


def edge_batch(length, n=3):
    """Rows that begin and end with the vocabulary's last token; the middle one has no target."""
    ids = torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(length))
    targets = ids.roll(-1, 1).clone()
    ids[:, 0] = ids[:, -1] = targets[:, -1] = VOCABULARY - 1
    targets[n // 2] = IGNORE
    return Batch(ids, targets, None, ids.numel())


def double_nats(net, batch):
    with torch.no_grad():
        log_p = net(input_ids=batch.ids).logits.double().log_softmax(-1)
    scored = batch.targets != IGNORE
    return -log_p[scored].gather(1, batch.targets[scored][:, None]).sum().item()


@pytest.mark.parametrize("length", [1, 2, 64])
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("kind", NETS)
def test_last_token_and_masked_rows(kind, n, length):
    net = NETS[kind]()
    method = make("lora", net)
    attach(method, net)
    shake(method)
    batch = edge_batch(length, n)
    nats = nats_of(net, batch)
    nats.backward()
    assert nats.item() == pytest.approx(double_nats(net, batch), rel=1e-5, abs=1e-7)
    assert batch.n_targets == (n - 1) * length
    gradients = [p.grad for p in net.peft.parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (n > 1)
    without = Batch(*(t[torch.arange(n) != n // 2] for t in batch[:2]), None, 0)
    if n > 1:  # the masked row counts for nothing
        assert nats.item() == pytest.approx(nats_of(net, without).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_target_at_all_is_zero_nats_and_no_gradient(dtype):
    hidden = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCABULARY, 16, dtype=dtype, requires_grad=True)
    nats = linear_nll(hidden, head, None, torch.full((2, 5), IGNORE))
    nats.backward()
    assert nats.item() == 0 and not hidden.grad.any() and not head.grad.any()
    net = NETS["llama"]()
    batch = edge_batch(4, 1)
    tally = evaluate(net, [batch, edge_batch(4, 3)], nats_of, autocast=False)
    assert (tally.targets, tally.nats) == (8, pytest.approx(double_nats(net, edge_batch(4, 3))))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_logits_from_tiny_to_huge(scale):
    """As float64 says, with the last token of the vocabulary as the target."""
    hidden = (torch.randn(7, 16) * scale).requires_grad_()
    head = torch.randn(VOCABULARY, 16)
    targets = torch.full((7,), VOCABULARY - 1)
    nats = linear_nll(hidden, head, None, targets)
    nats.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.double().T
    expected = (logits.logsumexp(-1) - logits[:, -1]).sum()
    expected.backward()
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
