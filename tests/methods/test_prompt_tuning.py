from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2, tiny_llama
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from peftlab.errors import InputError
from peftlab.parts import assemble

TEXT = [7, 2, 9]  # the tokens of "a text"


def tiny_gemma():
    """Its embeddings are scaled by the root of the width, inside their module."""
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval()


def reading(net, length):
    method = make("prompt_tuning", net, init="text", text="a text", length=length)
    method.read({"a text": TEXT}.__getitem__)
    method.attach(net)
    return method


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_outputs_and_gradients_are_those_of_peft(net, tokens, expect_close):
    base = net(tokens).logits
    theirs = get_peft_model(
        deepcopy(net), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    given: Any
    (given,) = (p for p in theirs.parameters() if p.requires_grad)
    method = make("prompt_tuning", net, length=3)
    method.attach(net)
    with torch.no_grad():
        method.P.copy_(given)
    logits = net(tokens).logits
    expected = theirs(input_ids=tokens).logits[:, 3:]
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, expected)
    ours = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    ours.backward()
    # theirs counts the first token too, predicted from the prompt alone
    first = F.cross_entropy(theirs(input_ids=tokens).logits[:, 2], tokens[:, 0], reduction="sum")
    whole = tokens.numel() * theirs(input_ids=tokens, labels=tokens).loss
    expect_close(ours, whole - first)
    (whole - first).backward()
    assert given.grad.abs().max() > 0.1
    expect_close(method.P.grad, given.grad, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma])
def test_the_embeddings_of_a_text_are_the_text(build, tokens, expect_close):
    net = build()
    longer = torch.cat([torch.tensor(TEXT).expand(3, -1), tokens], dim=1)
    base, expected = net(tokens).logits, net(longer).logits[:, 3:]
    assert (expected - base).abs().max() > 0.1
    reading(net, 3)
    expect_close(net(tokens).logits, expected)


@pytest.mark.parametrize(("length", "ids"), [(2, [7, 2]), (7, [7, 2, 9, 7, 2, 9, 7])])
def test_a_text_is_cut_or_repeated(length, ids, net):
    method = reading(net, length)
    assert torch.equal(method.P, net.get_input_embeddings()(torch.tensor(ids)))


def rows_in(table, P):
    """For each row of P, the rows of the table that it equals."""
    return [[i for i, row in enumerate(table) if torch.equal(row, p)] for p in P]


def test_vocabulary_draws_different_tokens_from_the_common_ones(net):
    table = net.get_input_embeddings().weight
    draws = set()
    for seed in range(3):
        for repeat in range(2):
            method = make("prompt_tuning", net, length=4, common=6)
            method.seed = seed
            method.attach(net)
            found = tuple(index for (index,) in rows_in(table, method.P))
            method.detach(net)
            assert len(set(found)) == 4 and max(found) < 6
            assert repeat == 0 or found in draws
            draws.add(found)
    assert len(draws) == 3
    method = make("prompt_tuning", net, length=13, common=5000)  # more than there are: from anew
    method.attach(net)
    found = [index for (index,) in rows_in(table, method.P)]
    assert set(found) == set(range(11)) and found[11:] == found[:2]


def test_random_has_the_size_of_the_common_embeddings():
    net = tiny_gemma()
    table: Any = net.get_input_embeddings().weight
    method = make("prompt_tuning", net, length=5000, common=6, init="random")
    method.attach(net)
    size = 4 * table[:6].square().mean().sqrt()  # the embedding's scale is √16
    assert abs(method.P.std() / size - 1) < 0.01 and abs(method.P.mean() / size) < 0.01
    assert not torch.equal(method.P[0], method.P[1])


def test_the_start_is_that_of_the_seed_and_only_of_the_first_time(net):
    torch.manual_seed(12)
    one = make("prompt_tuning", net)
    one.attach(net)
    with torch.no_grad():
        one.P.add_(1)
    trained = one.P.clone()
    one.detach(net)
    one.attach(net)
    assert torch.equal(one.P, trained)


def test_a_run_reads_the_text_with_its_tokenizer(compose):
    text = "Spell the word:"
    given = ("method=prompt_tuning", "method.init=text", "method.length=5", f'method.text="{text}"')
    parts = assemble(compose(*given))
    ids = AutoTokenizer.from_pretrained(parts.backbone.folder)(text, add_special_tokens=False)
    rows = torch.tensor([ids.input_ids[i % len(ids.input_ids)] for i in range(5)])
    net: Any = parts.net
    assert torch.equal(net.peft.P, net.get_input_embeddings().weight[rows].float())
    assert net.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


def test_a_run_refuses_packed_rows(compose):
    given = ("method=prompt_tuning", "dataset.packing=true", "dataset.block_length=64")
    with pytest.raises(InputError, match="^dataset.packing=true: false for a method that puts a"):
        assemble(compose(*given))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"length": 0}, "method.length=0: a whole number of at least 1"),
        ({"common": 0.5}, "method.common=0.5: a whole number of at least 1"),
        ({"init": "words"}, "method.init=words: one of vocabulary, text, random"),
        ({"init": "text"}, "method.text=None: for init=text, a text"),
        ({"init": "text", "text": ""}, "method.text=: for init=text, a text"),
        ({"text": "hello"}, "method.text=hello: null, for init=vocabulary"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("prompt_tuning", tiny_llama(), **changes)
    assert str(caught.value) == line


def test_a_text_without_tokens_is_refused():
    method = make("prompt_tuning", tiny_llama(), init="text", text=" ")
    with pytest.raises(InputError) as caught:
        method.read(lambda text: [])
    assert str(caught.value) == "method.text=' ': a text that has tokens"


def test_sites_of_another_width_are_refused():
    net = tiny_llama()
    with pytest.raises(InputError) as caught:
        make("prompt_tuning", net, sites=["up"]).attach(net)
    line = "method.sites=up: a kind of layer whose output is as wide as an embedding, 16"
    assert str(caught.value) == line
