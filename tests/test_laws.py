"""The laws: what every method in conf/method/ must obey, on both architectures."""

import inspect
from copy import deepcopy

import hydra
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import NETS, VOCABULARY, attach, defaults, make, shake
from hydra.core.override_parser.overrides_parser import OverridesParser

from peftlab.budget import model_sizes
from peftlab.cards import card
from peftlab.checkpoint import adapter_tensors, load_adapter, save_adapter
from peftlab.method import NotMergeable, WeightMethod, trainable
from peftlab.parts import NOT_ARGUMENTS
from peftlab.sites import FAMILIES, find_sites


def loss_of(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def has_own_tensors(method):
    return any(True for _ in method.parameters())


def count_of_peft(net, peft_type, args):
    """What peft itself says of its own model, targets being all linear layers."""
    names = [site.name for site in find_sites(net, FAMILIES[net.config.model_type], "all")]
    keywords = {"task_type": "CAUSAL_LM", "target_modules": names, **(args or {})}
    config = peft.get_peft_config({"peft_type": peft_type, **keywords})
    return peft.get_peft_model(deepcopy(net), config).get_nb_trainable_parameters()[0]


def test_identity_at_step_0(name, net, tokens, expect_close):
    base = net(tokens).logits
    method = make(name, net)
    attach(method, net)
    if method.identity:
        expect_close(net(tokens).logits, base)
        return
    assert (net(tokens).logits - base).abs().max() > 1e-3  # otherwise it should say that it is
    assert "not the identity" in " ".join(card(name).docstring.split())


def test_merge_equals_adapted(name, net, tokens, expect_close):
    keys = set(net.state_dict())
    base = net(tokens).logits
    method = make(name, net)
    attach(method, net)
    if not has_own_tensors(method):
        with torch.no_grad():
            next(p for _, p in trainable(net)).add_(0.1)
    shake(method)
    # tensors that the method gave the backbone, such as biases where it had none: merged, they stay
    given = {n for n, _ in trainable(net) if not n.startswith("peft.")} - keys
    adapted = net(tokens).logits
    assert (adapted - base).abs().max() > 1e-2  # away from the identity, or the law is vacuous
    if not method.mergeable:
        with pytest.raises(NotMergeable):
            method.merge(net)
        return
    method.merge(net)
    expect_close(net(tokens).logits, adapted)
    assert set(net.state_dict()) == keys | given
    assert not any(len(m._forward_hooks) for m in net.modules())


def test_factored_form_equals_literal_form_with_gradients(name, net, tokens, expect_close):
    method = make(name, net)
    if not isinstance(method, WeightMethod):
        pytest.skip("not a map of weights")
    shake(method)
    for site, t in list(zip(method.sites, method.tensors, strict=True))[:7]:
        x = torch.randn(2, 5, site.d_in, requires_grad=True)
        probe = torch.randn(2, 5, site.d_out)
        results = []
        for forward in (method.forward, lambda *a: WeightMethod.forward(method, *a)):
            for p in (x, *method.parameters()):
                p.grad = None
            y = forward(t, site.module, x, site.module(x))
            (y * probe).sum().backward()
            grads = [p.grad.clone() for p in (x, *method.parameters()) if p.grad is not None]
            results.append((y.detach(), *grads))
        for fast, plain in zip(*results, strict=True):
            expect_close(fast, plain, atol=1e-4)


def test_only_declared_tensors_change(name, net, tokens):
    method = make(name, net)
    attach(method, net)
    shake(method)
    declared = {n for n, _ in trainable(net)}
    before = deepcopy(dict(net.state_dict()))
    optimizer = torch.optim.AdamW([p for _, p in trainable(net)], lr=1e-2)
    loss_of(net, tokens).backward()
    optimizer.step()
    state = net.state_dict()
    moved = {state[n].data_ptr() for n in declared}  # one tensor may have a second, tied name
    changed = {n for n, t in state.items() if not torch.equal(t, before[n])}
    assert declared <= changed and all(state[n].data_ptr() in moved for n in changed)
    assert all(p.dtype == torch.float32 for _, p in trainable(net))


# transformers warns peft, which looks at an old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_count_equals_the_docstring(name, net):
    n_params, sizes = sum(p.numel() for p in net.parameters()), model_sizes(net)
    method = make(name, net)
    attach(method, net)
    counted = sum(p.numel() for _, p in trainable(net))
    arguments = {k: v for k, v in defaults(name).items() if k not in NOT_ARGUMENTS}
    if "peft_type" in arguments:
        sizes["n_peft"] = count_of_peft(NETS[net.config.model_type](), **arguments)
    assert card(name).count(method.sites, n_params, arguments | sizes) == counted > 0


def test_gradient_reaches_every_tensor(name, net, tokens):
    method = make(name, net)
    attach(method, net)
    shake(method)
    loss_of(net, tokens).backward()
    for tensor_name, p in trainable(net):
        assert p.grad is not None and torch.isfinite(p.grad).all(), tensor_name
        assert p.grad.abs().max() > 0, tensor_name


def test_each_tensor_has_one_name_and_no_shared_storage(name, net):
    attach(make(name, net), net)
    tensors = [t for n, t in adapter_tensors(net).items() if n.startswith("peft.")]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


def test_save_and_load_restore_the_function(name, net, tokens, tmp_path):
    other = deepcopy(net)
    method = make(name, net)
    attach(method, net)
    shake(method)
    if not has_own_tensors(method):
        with torch.no_grad():
            for _, p in trainable(net):
                p.mul_(1.1)
    save_adapter(net, tmp_path / "adapter.safetensors", {})
    torch.manual_seed(99)
    make(name, other).attach(other)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(net(tokens).logits, other(tokens).logits)


def test_three_steps_lower_the_loss(name, net, tokens):
    attach(make(name, net), net)
    optimizer = torch.optim.AdamW([p for _, p in trainable(net)], lr=3e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(net, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0]


def test_same_seed_same_tensors(name, net):
    one, two = make(name, net).state_dict(), make(name, net).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_detach_gives_the_backbone_back(name, net, tokens):
    base, keys = net(tokens).logits, set(net.state_dict())
    method = make(name, net)
    attach(method, net)
    shake(method)
    method.detach(net)
    assert torch.equal(net(tokens).logits, base) and set(net.state_dict()) == keys


def test_yaml_is_the_constructor_and_the_runs_three_keys(name):
    method = defaults(name)
    target = hydra.utils.get_class(method["_target_"])
    keywords = set(inspect.signature(target).parameters) - {"sites"}
    assert set(method) == keywords | set(NOT_ARGUMENTS)
    assert isinstance(method["lr"], float) and method["lr"] > 0


def test_search_is_in_hydras_grammar_and_names_keys_of_this_method(name):
    method = defaults(name)
    lines = [f"{key}={values}" for key, values in method["search"].items()]
    for override in OverridesParser.create().parse_overrides(lines):
        group, _, key = override.key_or_group.partition(".")
        assert override.is_sweep_override()
        assert (group, key) == ("optimizer", "lr") or (group == "method" and key in method)


# dynamo itself looks at .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", NETS)
def test_compile_takes_as_many_graphs_for_six_layers_as_for_three(name, kind, tokens):
    counts = {}
    for layers in (3, 6):
        torch._dynamo.reset()
        net = NETS[kind](layers)
        attach(make(name, net), net)
        graphs = []

        def count(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        blocks = net.model.layers if kind == "llama" else net.transformer.h
        for block in blocks:
            block.compile(backend=count)
        logits = net(tokens, use_cache=False).logits
        assert logits.shape == (*tokens.shape, VOCABULARY) and logits.isfinite().all()
        counts[layers] = len(graphs)
    assert counts[3] == counts[6] > 0


def test_a_cast_reaches_what_the_sites_see(name, net, tokens, expect_close):
    method = make(name, net)
    attach(method, net)
    shake(method)
    expected = net(tokens).logits
    net.double()
    assert all(
        tensor.dtype == torch.float64
        for t in getattr(method, "tensors", ())
        for tensor in vars(t).values()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    )
    expect_close(net(tokens).logits.float(), expected)
