import json
import time

import pytest
import torch
from conftest import NETS, attach, make, shake

from peftlab.analyses.inference import clocked, generate, operations, prefill
from peftlab.config import PACKAGE
from peftlab.method import SiteMethod
from peftlab.sites import FAMILIES, find_sites

LORA = ("method=lora", "method.rank=2", "seed=0")
IDS = torch.arange(6)[None]


def test_they_take_turns_and_the_first_round_does_not_count():
    seen = []
    turns = {name: lambda n=name: (seen.append(n), (float(len(seen)),))[1] for name in "ab"}
    assert clocked(turns, 2) == {"a": [(3.0,), (5.0,)], "b": [(4.0,), (6.0,)]}
    assert seen == ["a", "b"] * 3


class Slow(SiteMethod):
    """Changes nothing, and takes a millisecond per site."""

    def forward(self, t, site, x, y):
        time.sleep(1e-3)
        return y


@torch.no_grad()
def test_the_time_is_that_of_each_token(net):
    sites = find_sites(net, FAMILIES[net.config.model_type], ["o"])
    Slow(sites).attach(net)
    started = time.perf_counter()
    of_prompt, of_token = generate(net, IDS, 3)
    whole = 1e3 * (time.perf_counter() - started)
    per_pass = len(sites)  # ms, and what the model itself takes
    assert of_token > per_pass and 6 * of_prompt > per_pass
    assert 0.8 * whole < 6 * of_prompt + 3 * of_token <= whole
    started = time.perf_counter()
    (alone,) = prefill(net, IDS)
    whole = 1e3 * (time.perf_counter() - started)
    assert per_pass < 6 * alone and 0.8 * whole < 6 * alone <= whole


@torch.no_grad()
def test_it_generates_what_transformers_does(net):
    prompt = IDS
    seen = []
    handle = net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    generate(net, prompt, 4)
    handle.remove()
    mask = torch.ones_like(prompt)
    ids = net.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.cat(seen, dim=1).tolist() == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), [("lora", {"rank": 3}), ("houlsby", {})])
def test_the_operations_are_those_of_the_card(name, changes, net):
    """A product of [d_out, d_in] with a vector takes 2 d_out d_in operations."""
    bare = operations(net, IDS, 2, cached=True)
    method = make(name, net, **changes)
    attach(method, net)
    adapted = operations(net, IDS, 2, cached=True)
    size = 3  # of the bottleneck, too
    widths = [s.d_in + s.d_out if name == "lora" else 2 * s.d_out for s in method.sites]
    extra = 2 * size * sum(widths)
    assert adapted[0] - bare[0] == adapted[1] - bare[1] == extra > 0


@torch.no_grad()
def test_a_prefix_costs_what_attention_to_it_costs(net):
    bare = operations(net, IDS, 4, cached=True)
    method = make("prefix_tuning", net, length=3, hidden=None)
    method.attach(net)
    adapted = operations(net, IDS, 4, cached=True)
    assert method.n_positions == 3
    # per layer and head of width 4: a score and a share of V for each of three slots
    assert adapted[1] - bare[1] == 3 * 4 * 3 * (2 * 4 + 2 * 4)


@torch.no_grad()
def test_positions_and_caches_are_told(net, tokens):
    kinds = {"prompt_tuning": 3, "prefix_tuning": 3, "mam": 3, "unipelt": 3, "lora": 0}
    for name, expected in kinds.items():
        assert make(name, net).n_positions == expected
    peft = make("hf_peft", net, peft_type="PREFIX_TUNING", args={"num_virtual_tokens": 5})
    peft.attach(net)
    assert peft.n_positions == 5
    peft.detach(net)
    assert not make("ladder", net).cached


def test_who_says_so_can_generate_with_a_cache(name, tokens, expect_close):
    net = NETS["gpt2"]()
    method = make(name, net)
    attach(method, net)
    shake(method)
    with torch.no_grad():
        whole = net(input_ids=tokens, use_cache=False).logits
        if not method.cached:
            with pytest.raises(TypeError, match="no key-value cache"):
                net(input_ids=tokens[:, :4], use_cache=True)
            return
        first = net(input_ids=tokens[:, :4], use_cache=True)
        second = net(input_ids=tokens[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], dim=1)
    expect_close(logits, whole, atol=5e-5)


def test_runs(finished, ask, refused):
    few = ("--prompt", "8", "--tokens", "3", "--rounds", "3")
    lora, ladder = finished(*LORA), finished("method=ladder")
    answer = ask("inference", lora, ladder, finished("method=prompt_tuning"), *few)
    rows = {(row["run"].split()[0], row["model"]): row for row in answer["rows"]}
    forms = [("lora", "frozen"), ("lora", "adapted"), ("lora", "merged")]
    forms += [(m, f) for m in ("ladder", "prompt_tuning") for f in ("frozen", "adapted")]
    assert list(rows) == forms
    extra = {form: rows["lora", form]["extra, decode MFLOP"] for _, form in forms[:3]}
    # rank 2 in four layers: of widths d + 3 d, d + d, d + 4 d and 4 d + d
    d = json.loads((PACKAGE / "assets" / "tiny_gpt2" / "config.json").read_text())["n_embd"]
    assert extra["adapted"] == 2 * 2 * 4 * (4 + 2 + 5 + 5) * d / 1e6
    assert extra["frozen"] == extra["merged"] == 0
    for row in rows.values():
        spread = row["decode, quartiles ms"] or "0..0"
        low, high = map(float, spread.split(".."))
        middle = row["decode ms/token"] or 0
        assert 0.99 * low <= middle <= 1.01 * high  # as text they have three digits
        assert row["prefill ms/token"] > 0
    assert rows["lora", "frozen"]["to frozen"] == 1 and rows["lora", "adapted"]["to frozen"] > 0
    assert rows["ladder", "adapted"]["decode ms/token"] is None
    assert rows["ladder", "adapted"]["to frozen"] is None
    assert any("No decode for ladder" in note for note in answer["notes"])
    assert any("No merged model for ladder" in note for note in answer["notes"])
    ratios = {trace["name"]: trace for trace in answer["figures"][1]["traces"]}
    assert ratios.keys() == {"adapted", "merged"}
    assert [name.split()[0] for name in ratios["adapted"]["x"]] == ["lora", "prompt_tuning"]
    assert ratios["merged"]["y"] == [rows["lora", "merged"]["to frozen"]]
    assert rows["ladder", "adapted"]["extra, prefill MFLOP"] > 0
    length = rows["prompt_tuning", "adapted"]["positions"]
    assert length == 20
    line = refused("inference", lora, "--prompt", "10000")
    assert "--prompt=10000: at most " in line
    assert "--rounds=1: a whole number from 2" in refused("inference", lora, "--rounds", "1")
