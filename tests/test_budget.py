"""The solver of a parameter budget, held against brute force and against built methods."""

import itertools
import math

import pytest
import yaml

from peftlab import budget
from peftlab.backbone import load_backbone
from peftlab.config import HOME
from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.parts import build_method

MODEL = {"source": "bundled", "path": "tiny_gpt2", "sha256": None, "kinds": None}


def method_of(name, **changes):
    return yaml.safe_load((HOME / f"conf/method/{name}.yaml").read_text()) | changes


def built(name, changes):
    """Trained parameters of the real method on the real model."""
    more = {"name": "tiny_gpt2", "device": "cpu", "dtype": "auto", "attention": "auto"}
    model = MODEL | more | {"quantize": None, "revision": None}
    net = load_backbone(model, precision="fp32", block_length=32).net
    build_method(method_of(name, **changes), net, None).attach(net)
    return sum(p.numel() for _, p in trainable(net))


@pytest.mark.parametrize(
    ("name", "target"), [("lora", 98_304), ("houlsby", 50_000), ("sparse_adapter", 12_345)]
)
def test_one_dimension(name, target):
    found = budget.solve(MODEL, method_of(name), target, 0.02)
    assert built(name, found) == pytest.approx(target, rel=0.02)


def test_several_dimensions_change_most_evenly():
    method = method_of("tied_lora_extra")
    count = budget.counter(MODEL, method)
    found = budget.solve(MODEL, method, 60_000, 0.02)
    assert built("tied_lora_extra", found) == count(found) == pytest.approx(60_000, rel=0.02)

    def unevenness(r_1, r_2):
        return math.log(r_1 / 16) ** 2 + math.log(r_2 / 16) ** 2

    every = itertools.product(range(1, 65), repeat=2)
    fits = [p for p in every if abs(count({"r_1": p[0], "r_2": p[1]}) / 60_000 - 1) <= 0.02]
    best = min(unevenness(*p) for p in fits)
    assert unevenness(**found) <= best + 0.02


def test_the_one_dimension_that_is_asked_for():
    method = method_of("partially_tied_lora", l_a=2, l_b=8)
    rank = budget.solve_one(MODEL, method, "rank", 150_000, 0.03)
    assert built("partially_tied_lora", {"l_a": 2, "l_b": 8, "rank": rank}) == pytest.approx(
        150_000, rel=0.03
    )
    with pytest.raises(InputError, match=r"gamma: one of rank, l_a, l_b"):
        budget.solve_one(MODEL, method, "gamma", 150_000, 0.03)


DIMENSIONS = {
    "lora": {"rank"},
    "gamma_lora": {"rank"},
    "partially_tied_lora": {"rank", "l_a", "l_b"},
    "tensor_embedding": {"r_1", "r_2", "l_1"},
    "prompt_tuning": {"length"},
    "parallel_adapter": {"bottleneck"},
    "layernorm": set(),
    "krona": set(),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimensions_are_what_the_count_depends_on(name):
    method = method_of(name)
    assert set(budget.dimensions(method, budget.counter(MODEL, method))) == DIMENSIONS[name]


def test_what_no_dimension_meets():
    for name, target, told in (
        ("lora", 100, r"aux.budget=100: within 2% .* the nearest is 12,288 with rank=1"),
        ("layernorm", 100, "3,456, always"),
        ("lora", 10**7, r"lora cannot have rank=81. \(method.rank=81"),
        ("hf_peft", 100, "no count in closed form"),
        ("lora", 0, "aux.budget=0: a whole number, from 1"),
    ):
        with pytest.raises(InputError, match=told):
            budget.solve(MODEL, method_of(name), target, 0.02)
