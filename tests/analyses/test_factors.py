import numpy as np
import pytest
import torch
from oracle import result
from safetensors.numpy import load_file

from peftlab.analyses.factors import factor_name, movements, start_and_end
from peftlab.recorded import read_record

LORA = ("method=lora", "method.rank=2", "seed=0")


def test_by_hand():
    start = {"peft.A.h/0/q": torch.tensor([3.0, 4.0]), "peft.A.h/1/q": torch.tensor([0.0, 12.0])}
    start["peft.B.h/0/q"] = torch.zeros(4)
    end = {"peft.A.h/0/q": torch.tensor([3.0, 5.0]), "peft.A.h/1/q": torch.tensor([0.0, 6.0])}
    end["peft.B.h/0/q"] = torch.full((4,), 0.5)
    A, B = movements(start, end)
    assert (A.name, A.tensors, A.numbers) == ("A", 2, 4)
    assert A.moved == pytest.approx((37 / 169) ** 0.5)
    assert (A.least, A.most) == pytest.approx((1 / 5, 6 / 12))
    assert A.rms == pytest.approx((37 / 4) ** 0.5)
    assert (B.moved, B.least, B.most) == (None, None, None) and B.rms == 0.5


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("peft.A.model/layers/3/q_proj", "A"),
        ("peft.members.0.up.model/layers/3/mlp", "members.*.up"),
        ("peft.z", "z"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.weight"),
    ],
)
def test_names_without_places(name, short):
    assert factor_name(name) == short


@pytest.mark.parametrize(
    "words",
    [
        LORA,
        ("method=adamix_lora", "method.rank=2"),  # its file holds another shape than is trained
        ("method=far", "method.priming_steps=2"),  # starts where the data has led it
    ],
    ids=lambda words: words[0],
)
def test_the_start_is_what_the_run_started_from(finished, words):
    """A run that learns nothing leaves its start in its file."""
    still = finished(*words, "optimizer.lr=1e-30")
    start, end = start_and_end(read_record(finished(*words)))
    stored = load_file(still / "adapter.safetensors")
    assert set(start) == set(end) <= set(stored)
    for name, tensor in start.items():
        np.testing.assert_allclose(tensor, stored[name], atol=1e-26, rtol=0)
    assert any((end[name] - start[name]).abs().max() > 1e-6 for name in start)


def test_a_run(finished, ask):
    folder, still = finished(*LORA), finished(*LORA, "optimizer.lr=1e-30")
    answer = ask("factors", folder)
    A, B = answer["rows"]
    assert (A["factor"], B["factor"], A["tensors"]) == ("A", "B", 16)
    assert A["numbers"] + B["numbers"] == result(folder)["method"]["trainable_params"]
    end, start = (load_file(f / "adapter.safetensors") for f in (folder, still))
    names = [name for name in start if name.startswith("peft.A.")]
    each = [np.linalg.norm(end[n] - start[n]) / np.linalg.norm(start[n]) for n in names]
    squares = [
        sum(np.sum(np.square(t(n), dtype=float)) for n in names)
        for t in (lambda n: end[n] - start[n], lambda n: start[n])
    ]
    assert A["moved ‖T-T₀‖/‖T₀‖"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)
    assert A["least moved"] == pytest.approx(min(each), rel=1e-5)
    assert A["most moved"] == pytest.approx(max(each), rel=1e-5)
    ends = np.concatenate([end[n.replace(".A.", ".B.")].ravel() for n in names]).astype(float)
    assert B["change rms"] == pytest.approx(np.sqrt(np.mean(ends**2)), rel=1e-5)
    assert B["start rms"] == 0 and B["moved ‖T-T₀‖/‖T₀‖"] is None
    assert max(A["to the fastest change, rms"], B["to the fastest change, rms"]) == 1


def test_other_data_is_refused(finished, refused):
    folder = finished("method=lora", "method.rank=2", "seed=3")
    result_file = folder / "result.json"
    text, true = result_file.read_text(), result(folder)["dataset"]["fingerprint"]
    result_file.write_text(text.replace(true, "f" * 64))
    assert f"dataset.fingerprint={true}: that of {folder}, ffff" in refused("factors", folder)
    result_file.write_text(text)
