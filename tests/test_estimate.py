"""The estimate against the same numbers taken from real tensors."""

import pytest
import torch
import yaml
from conftest import NETS, attach, defaults, make
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlab.backbone import DTYPES
from peftlab.config import HOME
from peftlab.data import Batch
from peftlab.estimate import estimate, step_flops
from peftlab.fit import nats_of
from peftlab.flops import FlopCounter
from peftlab.method import trainable

ROWS, LENGTH = 2, 12


def optimizer(name, **changes):
    node = yaml.safe_load((HOME / "conf" / "optimizer" / f"{name}.yaml").read_text())
    del node["defaults"]
    return node | {"lr": 1e-3} | changes


def estimated(name, net, node=None, **more):
    node = node or optimizer("adamw")
    where = {"rows": ROWS, "length": LENGTH, "precision": "fp32", **more}
    return estimate(net.config, defaults(name) | where.pop("changes", {}), node, **where)


# In bf16 torch's fake LayerNorm keeps statistics half as wide where its parameters are float32.
EXACT = {"fp32": ["lora", "full", "bitfit", "ladder"], "bf16": ["lora", "full"]}
CASES = [(precision, method) for precision, methods in EXACT.items() for method in methods]
ATTENTION = {"fp32": "sdpa", "bf16": "eager"}  # of a run on a CPU, up to 128 tokens


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("precision", "method"), CASES)
def test_it_is_what_real_tensors_hold(precision, method, kind):
    net = NETS[kind]()
    changes = {"create": True} if method == "bitfit" else {}
    memory = estimated(method, net, changes=changes, precision=precision)
    net.to(DTYPES[precision])
    net.set_attn_implementation(ATTENTION[precision])
    backbone = sum(p.numel() for p in net.parameters())
    built = make(method, net, **changes)
    attach(built, net)
    net.train()
    params = [p for _, p in trainable(net)]
    n_trained = sum(p.numel() for p in params)
    assert memory.trained == memory.gradients == 4 * n_trained
    if method in ("lora", "ladder"):
        assert memory.frozen >= DTYPES[precision].itemsize * backbone
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        net.base_model(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64), use_cache=False)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    assert memory.activations == sum(s.nbytes() for at, s in kept.items() if at not in own) > 0
    real = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    real.step()
    states = [value for state in real.state.values() for value in state.values()]
    assert memory.optimizer == sum(value.nbytes for value in states)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of norms
@pytest.mark.parametrize("changes", [{"peft_type": "LORA"}, {"peft_type": "LN_TUNING"}])
def test_a_method_may_copy_its_layers(monkeypatch, changes):
    """What knows the shapes is not copied with them: Python crashed some collections later."""

    def copied(mode, protocol):
        raise AssertionError("the mode was copied")

    monkeypatch.setattr(FakeTensorMode, "__reduce_ex__", copied)  # what a deep copy begins with
    changes = changes | {"args": {"target_modules": None}}  # peft's own choice
    assert estimated("hf_peft", NETS["llama"](), changes=changes).activations > 0


def test_nf4_and_bf16_hold_less():
    net = NETS["llama"]()
    fp32, bf16 = (estimated("lora", net, precision=p) for p in ("fp32", "bf16"))
    nf4 = estimated("lora", net, precision="bf16", quantize="nf4")
    assert nf4.frozen < bf16.frozen < fp32.frozen
    assert fp32.trained == bf16.trained == nf4.trained


def test_updates_within_backward_hold_one_gradient():
    net = NETS["llama"]()
    whole, layerwise = (
        estimated("full", net, optimizer("galore", rank=4, per_layer=per_layer))
        for per_layer in (False, True)
    )
    assert layerwise.gradients == 4 * max(p.numel() for p in net.parameters())
    assert whole.gradients == 4 * sum(p.numel() for p in net.parameters())
    assert whole.optimizer == layerwise.optimizer < estimated("full", net).optimizer
    assert whole.peak == whole.frozen + whole.trained + whole.optimizer + max(
        whole.activations + whole.loss, whole.gradients
    )


@pytest.mark.parametrize("method", ["lora", "full", "top_layers", "ladder"])
@pytest.mark.parametrize("kind", NETS)
def test_operations_are_those_of_a_real_step(kind, method):
    net = NETS[kind]()
    where = {"rows": ROWS, "length": LENGTH, "precision": "fp32"}
    counted = step_flops(net.config, defaults(method), optimizer("adamw"), **where)
    assert net.config._attn_implementation == "eager"  # not touched
    net.set_attn_implementation("sdpa")
    attach(make(method, net), net)
    net.train()
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with FlopCounter() as real:
        nats_of(net, Batch(ids, ids, None, ids.numel())).backward()
    assert counted == real.total > 0
