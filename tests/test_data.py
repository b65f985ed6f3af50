import collections
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftlab.bits import IGNORE
from peftlab.data import EVAL_TOKENS, KEYS, PASS, Batch, Data, load_data
from peftlab.documents import Template
from peftlab.errors import InputError
from peftlab.sources import Rows
from peftlab.splits import choose

EOS, BOS = 0, 1
DATASETS = Path(__file__).parents[1] / "conf" / "dataset"


def characters(*, bos: bool = False, appends_eos: bool = False, eos: bool = True):
    """A tokenizer whose ids are code points; pad is EOS, as in the default model."""
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": 2}
    vocabulary |= {chr(code): code for code in (10, *range(32, 127), 0xE9)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    single = f"{'<bos>:0 ' if bos else ''}$A:0{' <eos>:0' if appends_eos else ''}"
    words.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    special = {"eos_token": "<eos>", "pad_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", **special)


class Maker:
    """Makes the tokenizer, and counts how often it was asked to."""

    def __init__(self, **kinds):
        self.kinds = kinds
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return characters(**self.kinds)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(path, **keys):
    """dataset=local dataset.path=... on the command line."""
    chosen = yaml.safe_load((DATASETS / "local.yaml").read_text()) | {"path": str(path)}
    assert keys.keys() <= chosen.keys()
    return chosen | keys


def load(dataset, *, seed=0, batch=2, micro_batch=2, tokenizer_id=None, **kinds) -> Data:
    return load_data(
        dataset,
        tokenizer=Maker(**kinds),
        tokenizer_id=tokenizer_id or repr(sorted(kinds.items())),
        seed=seed,
        batch=batch,
        micro_batch=micro_batch,
    )


def folder_of(tmp_path, train, test=None):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in (("train", train), ("test", test or train)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def lists(split):
    return [(e.ids.tolist(), e.targets.tolist()) for e in split.examples]


def codes(text):
    return [ord(character) for character in text]


QA = [{"question": "ab", "answer": "cd"}, {"question": "a", "answer": "xyz"}]
X = IGNORE


# --- ids and targets ------------------------------------------------------------------------------


def test_completion_targets_begin_at_the_last_field(tmp_path):
    dataset = config(folder_of(tmp_path, QA), template="{question}:{answer}.")
    train = load(dataset).train
    assert lists(train) == [
        (codes("ab:cd."), [X, X, *codes("cd."), EOS]),
        (codes("a:xyz."), [X, *codes("xyz."), EOS]),
    ]
    assert (train.n_rows, train.n_targets, train.n_bytes) == (2, 4 + 5, 3 + 4)
    assert (train.n_truncated, train.n_truncated_tokens) == (0, 0)


def test_all_targets_but_the_first_token(tmp_path):
    dataset = config(folder_of(tmp_path, QA), template="{question}:{answer}", loss_on="all")
    train = load(dataset).train
    assert lists(train) == [
        (codes("ab:cd"), [*codes("b:cd"), EOS]),
        (codes("a:xyz"), [*codes(":xyz"), EOS]),
    ]
    assert (train.n_targets, train.n_bytes) == (5 + 5, 4 + 4)  # the first byte is not scored


@pytest.mark.parametrize("appends_eos", [False, True])
def test_bos_stands_in_front_once_and_makes_the_first_character_a_target(tmp_path, appends_eos):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}", loss_on="all")
    train = load(dataset, bos=True, appends_eos=appends_eos).train
    assert lists(train)[0] == ([BOS, *codes("abcd")], [*codes("abcd"), EOS])
    assert (train.n_targets, train.n_bytes) == (10, 8)
    completion = load(dataset | {"loss_on": "completion"}, bos=True, appends_eos=appends_eos)
    assert lists(completion.train)[0] == ([BOS, *codes("abcd")], [X, X, *codes("cd"), EOS])


def test_a_template_that_begins_with_its_last_field_has_no_prompt(tmp_path):
    dataset = config(folder_of(tmp_path, [{"text": "abé"}]), loss_on="completion")
    assert lists(load(dataset).train) == [(codes("abé"), [*codes("bé"), EOS])]
    assert load(dataset).train.n_bytes == 3  # b is one byte, é two
    assert load(dataset, bos=True).train.n_bytes == 4


def test_truncation_counts_what_it_cuts(tmp_path, capsys):
    rows = [{"text": "abcdef"}, {"text": "ab"}, {"text": "abcdé"}]
    train = load(config(folder_of(tmp_path, rows), block_length=4)).train
    assert lists(train) == [
        (codes("abcd"), codes("bcde")),
        (codes("ab"), [ord("b"), EOS]),
        (codes("abcd"), codes("bcdé")),
    ]
    assert (train.n_truncated, train.n_truncated_tokens) == (2, 2 + 1)  # f and EOS; EOS
    assert (train.n_targets, train.n_bytes) == (4 + 2 + 4, 4 + 1 + 5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "train: 2 of 3 rows are longer than dataset.block_length=4: 3 tokens cut off"
    )


def test_replacements_are_made_in_order_in_field_values_only(tmp_path):
    rows = [{"question": "a\nb", "answer": "1\n#### 2"}]
    dataset = config(
        folder_of(tmp_path, rows),
        template="Q: {question}\nA: {answer}.\n",
        replace={"#### ": "The answer is ", "\n": " "},
        loss_on="all",
    )
    ids, targets = lists(load(dataset).train)[0]
    assert "".join(map(chr, ids)) == "Q: a b\nA: 1 The answer is 2.\n"
    assert targets == [*ids[1:], EOS]


def test_numbers_are_text_and_special_tokens_are_what_the_tokenizer_says(tmp_path):
    rows = [{"prompt": 7, "completion": 1.5}, {"prompt": "", "completion": "a<eos>b"}]
    train = load(config(folder_of(tmp_path, rows))).train
    assert lists(train) == [
        (codes("71.5"), [*codes("1.5"), EOS]),
        ([ord("a"), EOS, ord("b")], [EOS, ord("b"), EOS]),
    ]


def test_template_braces():
    template = Template("{{{a}}} {b c}{{", {})
    assert template.fill({"a": "x", "b c": "y"}, "row") == ("{x} ", "y{")


# --- packing --------------------------------------------------------------------------------------


def test_packing_loses_no_target_and_restarts_positions(tmp_path):
    rows = [{"text": "abcde"}, {"text": "fg"}, {"text": "hijkl"}]
    train = load(config(folder_of(tmp_path, rows), packing=True, block_length=4)).train
    assert [
        tuple(part.tolist() for part in example if part is not None) for example in train.examples
    ] == [
        (codes("abcd"), codes("bcde"), [0, 1, 2, 3]),
        (codes("efgh"), [EOS, ord("g"), EOS, ord("i")], [0, 0, 1, 0]),
        (codes("ijkl"), [*codes("jkl"), EOS], [0, 1, 2, 3]),
    ]
    assert (train.n_rows, train.n_targets, train.n_bytes) == (3, 12, 4 + 1 + 4)
    assert (train.n_truncated, train.n_truncated_tokens) == (0, 0)


def test_packing_leaves_out_blocks_without_a_target(tmp_path):
    rows = [{"prompt": "abcdefgh", "completion": "i"}]
    train = load(config(folder_of(tmp_path, rows), packing=True, block_length=3)).train
    assert lists(train) == [(codes("ghi"), [X, ord("i"), EOS])]


def network(kind):
    # Not at the top: the processes that this file starts import it too.
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "llama":
        shape = LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return LlamaForCausalLM(shape)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_documents_are_computed_as_if_alone(tmp_path, kind, attention):
    texts = ["abc", "defgh", "ij", "klmno"]
    rows = [{"text": text} for text in texts]
    data = load(config(folder_of(tmp_path, rows), packing=True, block_length=10))
    (block,) = data.batches(data.train)
    assert block.positions is not None and block.ids.shape == (2, 10)
    net = network(kind).eval()
    net.set_attn_implementation(attention)
    packed = net(block.ids, position_ids=block.positions, use_cache=False).logits
    for row, place, text in ((0, 0, "abc"), (0, 3, "defgh"), (0, 8, "ij"), (1, 0, "klmno")):
        alone = net(torch.tensor([codes(text)]), use_cache=False).logits[0]
        torch.testing.assert_close(packed[row, place : place + len(text)], alone)
    mixed = net(block.ids, use_cache=False).logits  # without positions the law does not hold
    assert (mixed[0, 3:8] - packed[0, 3:8]).abs().max() > 1e-3


# --- batches --------------------------------------------------------------------------------------


def test_padding_is_known_by_length_not_by_id(tmp_path):
    rows = [{"text": "abcd"}, {"text": "a<eos>b"}, {"text": "abc"}]
    data = load(config(folder_of(tmp_path, rows)), batch=3, micro_batch=3)
    (batch,) = data.batches(data.train)
    assert batch.ids.tolist() == [
        codes("abcd"),
        [ord("a"), EOS, ord("b"), 0],
        [*codes("abc"), 0],
    ]
    assert batch.targets.tolist() == [
        [*codes("bcd"), EOS],
        [EOS, ord("b"), EOS, X],
        [*codes("bc"), EOS, X],
    ]
    assert batch.positions is None
    assert (batch.n_tokens, batch.n_targets) == (10, 10)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64


@pytest.fixture
def many(tmp_path):
    """53 rows of 2 to 40 characters, each with another text."""
    lengths = [2 + (7 * n) % 39 for n in range(53)]
    rows = [{"text": (f"{n:02d}" * 20)[:length]} for n, length in enumerate(lengths)]
    return config(folder_of(tmp_path, rows))


def rows_of(batch: Batch):
    return [
        tuple(ids[: int((targets != X).sum())].tolist())
        for ids, targets in zip(batch.ids, batch.targets, strict=True)
    ]


def test_steps_are_a_pure_function_of_seed_and_epoch(many):
    def order(seed, epoch):
        steps = load(many, batch=4, seed=seed).steps(epoch)
        return [row for step in steps for batch in step for row in rows_of(batch)]

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert len({tuple(sorted(each)) for each in orders}) == 1


def test_every_row_once_per_epoch_and_only_the_last_step_is_smaller(many):
    data = load(many, batch=4, micro_batch=2)
    steps = data.steps(0)
    assert data.n_steps == len(steps) == 14  # ceil(53 / 4)
    sizes = [sum(len(batch.ids) for batch in step) for step in steps]
    assert sizes == [4] * 13 + [1]
    seen = collections.Counter(row for step in steps for batch in step for row in rows_of(batch))
    expected = collections.Counter(tuple(e.ids.tolist()) for e in data.train.examples)
    assert seen == expected and len(seen) == 53


def test_the_rows_of_a_step_do_not_depend_on_micro_batch(many):
    def sets(micro_batch):
        steps = load(many, batch=4, micro_batch=micro_batch).steps(3)
        assert all(len(batch.ids) <= micro_batch for step in steps for batch in step)
        return [sorted(row for batch in step for row in rows_of(batch)) for step in steps]

    assert sets(1) == sets(2) == sets(3) == sets(4) == sets(16)


def test_bucketing_keeps_padding_small(many):
    data = load(many, batch=4, micro_batch=4)
    tokens = sum(len(example.ids) for example in data.train.examples)
    padded = sum(batch.ids.numel() for step in data.steps(0) for batch in step)
    n_tokens = sum(batch.n_tokens for step in data.steps(0) for batch in step)
    assert n_tokens == tokens
    assert padded < 1.2 * tokens  # in plain random order: 1.6


def test_evaluation_batches_hold_every_row_within_the_budget(tmp_path):
    rows = [{"text": "x" * (1000 + 10 * n)} for n in range(9)] + [{"text": "y" * 5000}]
    data = load(config(folder_of(tmp_path, rows), block_length=6000))
    made = data.batches(data.test)
    assert [len(batch.ids) for batch in made] == [1, 3, 3, 3]
    assert made[0].ids.shape == (1, 5000)  # longer than the budget: alone
    assert all(batch.ids.numel() <= EVAL_TOKENS for batch in made[1:])
    assert sum(batch.n_targets for batch in made) == data.test.n_targets


def cost(batches) -> tuple[int, int]:
    """Of passes over these batches: rows that are alone, and tokens."""
    alone = sum(len(batch.ids) == 1 for batch in batches)
    return alone, sum(batch.ids.numel() + PASS for batch in batches)


def ways(lengths, limit=math.inf):
    """All costs of passes over rows of these lengths, longest first, at most `limit` together."""
    if not lengths:
        return [(0, 0)]
    return [
        (alone + (n == 1), tokens + lengths[0] * n + PASS)
        for n in range(1, len(lengths) + 1)
        if n == 1 or lengths[0] * n <= limit
        for alone, tokens in ways(lengths[n:], limit)
    ]


@pytest.mark.parametrize("step", (50, 400))  # with and without rows too long for two to a batch
def test_evaluation_batches_cost_as_little_as_any(tmp_path, step):
    rows = [{"text": "x" * length} for length in range(10, 3500, step)][:10]
    data = load(config(folder_of(tmp_path, rows + rows[:2] + rows[-1:]), block_length=4000))
    lengths = sorted((len(example.ids) for example in data.train.examples), reverse=True)
    made = data.batches(data.train)
    assert 1 < len(made) <= len(lengths)
    assert cost(made) == min(ways(lengths, EVAL_TOKENS))
    assert cost(made)[1] < sum(lengths[0] + PASS for _ in lengths)


@pytest.mark.parametrize("micro_batch", (5, 8))
def test_a_step_is_split_where_that_costs_less(tmp_path, micro_batch):
    rows = [{"text": "x" * (5 + 3 * n**2)} for n in range(12)] + [{"text": "y" * 9}] * 6
    settings = config(folder_of(tmp_path, rows), train_size=16)
    data = load(settings, batch=8, micro_batch=micro_batch)
    whole, split = data.steps(1), data.steps(1, split=True)
    assert [sorted(r for b in step for r in rows_of(b)) for step in whole] == [
        sorted(r for b in step for r in rows_of(b)) for step in split
    ]
    assert sum(map(len, split)) > sum(map(len, whole))
    for before, after in zip(whole, split, strict=True):
        parts = [sorted(map(len, rows_of(batch)), reverse=True) for batch in before]
        best = [min(ways(lengths)) for lengths in parts]
        assert cost(after) == tuple(map(sum, zip(*best, strict=True)))


# --- splits ---------------------------------------------------------------------------------------


def numbered(n, **more):
    return Rows([{"text": f"row {i}", "group": i // 4} | more for i in range(n)], None)


def sizes(**keys):
    return {"train_size": None, "test_size": 0.1, "split_by": None, "split_seed": 0} | keys


def indices(chosen):
    return [index for index, _ in chosen]


def test_a_split_without_overlap_that_train_size_does_not_move():
    train, test = choose(numbered(50), sizes(test_size=0.1))
    assert len(test) == 5 and sorted(indices(train) + indices(test)) == list(range(50))
    assert all(row["text"] == f"row {index}" for index, row in train + test)
    few, same = choose(numbered(50), sizes(test_size=5, train_size=10))
    fewer, _ = choose(numbered(50), sizes(test_size=5, train_size=4))
    assert same == test and len(few) == 10
    assert set(indices(fewer)) < set(indices(few)) < set(indices(train))
    assert choose(numbered(50), sizes(split_seed=1))[1] != test
    # Pinned: another order would change every published number.
    assert indices(test) == [1, 14, 28, 36, 43]


def test_groups_are_held_out_whole():
    train, test = choose(numbered(80), sizes(test_size=6, split_by="group", train_size=30))
    groups = [{row["group"] for _, row in part} for part in (train, test)]
    assert len(test) == 6 and len(train) == 30 and not groups[0] & groups[1]
    everything, _ = choose(numbered(80), sizes(test_size=6, split_by="group"))
    assert len(everything) == 64  # 4 of the 20 groups are held out, though 2 would hold 6 rows
    assert len(groups[1]) > 2


def test_a_test_split_is_used_whole_or_sampled():
    rows = Rows(numbered(9).train, numbered(20).train)
    assert [len(part) for part in choose(rows, sizes(test_size=0.1))] == [9, 20]
    train, test = choose(rows, sizes(test_size=7, train_size=3))
    assert (len(train), len(test)) == (3, 7)


# --- cache ----------------------------------------------------------------------------------------


def test_the_second_load_does_not_tokenise(tmp_path, cache):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}")
    maker = Maker()
    arguments = {"tokenizer_id": "one", "seed": 0, "batch": 2, "micro_batch": 1}
    first = load_data(dataset, tokenizer=maker, **arguments)
    second = load_data(dataset | {"name": "other"}, tokenizer=maker, **arguments)
    assert maker.calls == 1
    assert (first.name, second.name) == ("local", "other")
    assert first.fingerprint == second.fingerprint
    assert lists(first.train) == lists(second.train)
    assert first.train.n_bytes == second.train.n_bytes == 5
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


CHANGES = {
    "template": "{question} {answer}",
    "replace": {"a": "b"},
    "loss_on": "all",
    "block_length": 3,
    "packing": True,
    "train_size": 1,
    "test_size": 1,
    "split_seed": 1,
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_request_is_tokenised_anew(tmp_path, key):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}")
    maker = Maker()
    arguments = {"tokenizer_id": "one", "seed": 0, "batch": 2, "micro_batch": 1}
    load_data(dataset, tokenizer=maker, **arguments)
    load_data(dataset | {key: CHANGES[key]}, tokenizer=maker, **arguments)
    assert maker.calls == 2


def test_changed_content_or_tokenizer_is_tokenised_anew(tmp_path):
    folder = folder_of(tmp_path, QA)
    dataset = config(folder, template="{question}{answer}")
    first = load(dataset)
    assert load(dataset, tokenizer_id="another").fingerprint == first.fingerprint
    assert load(dataset, bos=True).fingerprint != first.fingerprint
    (folder / "train.jsonl").write_text('{"question": "n", "answer": "ew"}\n')
    assert lists(load(dataset).train) == [(codes("new"), [*codes("ew"), EOS])]
    assert load(dataset).fingerprint != first.fingerprint


def test_the_fingerprint_sees_order_and_targets(tmp_path):
    folder = folder_of(tmp_path, QA)
    dataset = config(folder, template="{question}{answer}")
    first = load(dataset)
    masked = load(dataset | {"loss_on": "all"})
    assert lists(masked.train)[0][0] == lists(first.train)[0][0]
    assert masked.fingerprint != first.fingerprint
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(reversed(lines)))
    assert load(dataset).fingerprint != first.fingerprint


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def swap_for_other_tokens(file):
    tensors = load_file(file)
    tensors["ids"] += 1
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [cut, flip, swap_for_other_tokens, Path.unlink])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_cache_entry_is_refused(tmp_path, cache, damage, split):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}")
    load(dataset)
    (file,) = (cache / "tokens").glob(f"*/{split}.safetensors")
    damage(file)
    with pytest.raises(InputError, match=rf"^PEFTLAB_CACHE=.*{file}.* is damaged; delete"):
        load(dataset)


def test_a_failed_build_leaves_nothing(tmp_path, cache):
    with pytest.raises(InputError):
        load(config(folder_of(tmp_path, QA), template="{question}{missing}"))
    assert not [path for path in (cache / "tokens").iterdir() if path.is_dir()]


def test_two_processes_may_fill_the_cache_at_once(tmp_path, cache):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}")
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_data import Maker, load_data
        maker = Maker()
        Path({str(tmp_path)!r}, "ready." + sys.argv[1]).touch()
        while len(list(Path({str(tmp_path)!r}).glob("ready.*"))) < 2:
            time.sleep(0.01)
        data = load_data({dataset!r}, tokenizer=maker, tokenizer_id="[]", seed=0, batch=2,
                         micro_batch=2)
        print(maker.calls, data.fingerprint)
    """)
    runs = [
        subprocess.Popen([sys.executable, "-c", program, n], stdout=subprocess.PIPE, text=True)
        for n in "ab"
    ]
    said = sorted(run.communicate(timeout=120)[0] for run in runs)
    fingerprint = load(dataset).fingerprint
    assert said == [f"0 {fingerprint}\n", f"1 {fingerprint}\n"]
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


def test_a_warm_start_imports_neither_datasets_nor_transformers(tmp_path):
    dataset = config(folder_of(tmp_path, QA), template="{question}{answer}")
    load(dataset)
    program = textwrap.dedent(f"""
        import sys
        from peftlab.data import load_data
        data = load_data({dataset!r}, tokenizer=None, tokenizer_id="[]", seed=0, batch=2,
                         micro_batch=2)
        assert data.n_steps == 1
        print([name for name in ("datasets", "transformers", "pyarrow") if name in sys.modules])
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


# --- errors ---------------------------------------------------------------------------------------

BAD_KEYS = [
    ({"loss_on": "answer"}, "dataset.loss_on=answer: must be all or completion"),
    ({"block_length": 1}, "dataset.block_length=1: must be a whole number of at least 2"),
    ({"block_length": 2.5}, "dataset.block_length=2.5: must be a whole number of at least 2"),
    ({"packing": "yes"}, "dataset.packing=yes: must be true or false"),
    ({"train_size": 0}, "dataset.train_size=0: must be null"),
    ({"train_size": -1}, "dataset.train_size=-1: must be null"),
    ({"train_size": 0.5}, "dataset.train_size=0.5: must be null"),
    ({"train_size": 3}, "dataset.train_size=3: only 2 rows are there for train"),
    ({"test_size": 0}, "dataset.test_size=0: must be null"),
    ({"test_size": 1.0}, "dataset.test_size=1.0: must be null"),
    ({"test_size": 3}, "dataset.test_size=3: only 2 rows are there for test"),
    ({"split_seed": None}, "dataset.split_seed=None: must be a whole number"),
    ({"split_by": "question"}, "dataset.split_by=question: must be null: the data set has its"),
    ({"replace": "x"}, "dataset.replace=x: must be null, or map text to the text"),
    ({"replace": {"": "x"}}, "dataset.replace={'': 'x'}: must be null, or map text"),
    ({"template": 5}, "dataset.template=5: must be text, or null"),
    (
        {"template": None},
        "dataset.template=None: needed unless rows have the field text, or prompt",
    ),
    ({"template": "plain"}, "dataset.template='plain': has no field"),
    ({"template": "{answer"}, "dataset.template='{answer': must hold {field} names"),
    ({"template": "{answer}}"}, "dataset.template='{answer}}': must hold {field} names"),
    ({"template": "{}"}, "dataset.template='{}': must hold {field} names"),
    ({"template": "{a.b}"}, "dataset.template='{a.b}': must hold {field} names"),
    ({"template": "{a[0]}"}, "dataset.template='{a[0]}': must hold {field} names"),
    ({"template": "{a!r}"}, "dataset.template='{a!r}': must hold {field} names"),
    ({"template": "{a:>9}"}, "dataset.template='{a:>9}': must hold {field} names"),
    ({"template": "{a:{b}}"}, "dataset.template='{a:{b}}': must hold {field} names"),
    (
        {"template": "{question}{reply}"},
        "dataset.template='{question}{reply}': train row 0 has no field 'reply'; it has question, "
        "answer",
    ),
    (
        {"template": "{question}{answer}", "block_length": 2, "train_size": 2},
        "dataset.block_length=2: train row 0 has 6 tokens, and all that would be scored is cut",
    ),
    ({"source": "nowhere"}, "dataset.source=nowhere: must be one of bfcl, chatterbot, cmudict,"),
    ({"source": "_gsm_generate"}, "dataset.source=_gsm_generate: must be one of bfcl"),
    ({"source": "bfcl"}, "must be null, the source bfcl has no use for it (your own files"),
    ({"subset": "main"}, "dataset.subset=main: must be null, the source local has no use for it"),
]


def one_line(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("keys", "said"), BAD_KEYS, ids=lambda value: str(value)[:40])
def test_bad_keys(tmp_path, keys, said):
    rows = [{"question": "abcde", "answer": "f"}, {"question": "abcde", "answer": "g"}]
    dataset = config(folder_of(tmp_path, rows), template="{question}:{answer}")
    with pytest.raises(InputError) as raised:
        load(dataset | keys)
    assert said in one_line(raised)


@pytest.mark.parametrize("key", ["batch", "micro_batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_batch(many, key, value):
    with pytest.raises(InputError) as raised:
        load(many, **{key: value})
    assert one_line(raised) == f"{key}={value}: must be a whole number of at least 1"


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key(many, key):
    del many[key]
    with pytest.raises(InputError, match=rf"^dataset\.{key}: missing"):
        load(many)


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}])
def test_a_field_that_is_no_text(tmp_path, value):
    rows = [{"text": "a"}, {"text": value}]
    with pytest.raises(InputError) as raised:
        load(config(folder_of(tmp_path, [{"text": "a"}], rows)))
    assert re.match(
        r"dataset\.template='\{text\}': test row 1 has text=.*; must be text or a number$",
        one_line(raised),
    )


def test_a_row_without_a_target(tmp_path):
    rows = [{"text": "ab"}, {"text": ""}]
    with pytest.raises(InputError) as raised:
        load(config(folder_of(tmp_path, rows)))
    assert one_line(raised) == (
        "dataset.template='{text}': train row 1 is empty, so it has no target"
    )
    with_bos = load(config(tmp_path / "rows"), bos=True)
    assert lists(with_bos.train)[1] == ([BOS], [EOS])


def test_a_tokenizer_without_eos(many):
    with pytest.raises(InputError) as raised:
        load(many, eos=False, tokenizer_id="mine")
    assert one_line(raised) == "tokenizer=mine: has no EOS token, which must end every row"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"test_size": None}, "dataset.test_size=None: give one: the data set has no test split"),
        ({"test_size": 0.01}, "dataset.test_size=0.01: of 10 rows that is none"),
        ({"test_size": 10}, "dataset.train_size=None: the train split is empty"),
        ({"test_size": 11}, "dataset.train_size=None: the train split is empty"),
        (
            {"test_size": 2, "train_size": 9},
            "dataset.train_size=9: only 8 rows are there for train",
        ),
        ({"split_by": "topic"}, "dataset.split_by=topic: row 0 has no field 'topic'; it has text"),
    ],
)
def test_bad_sizes_for_one_file(tmp_path, keys, said):
    (tmp_path / "rows.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(InputError) as raised:
        load(config(tmp_path / "rows.txt", **keys))
    assert one_line(raised) == said


# --- conf/dataset ---------------------------------------------------------------------------------


def test_every_data_set_has_the_same_documented_keys():
    files = sorted(DATASETS.glob("*.yaml"))
    assert [file.stem for file in files] == sorted(
        "bfcl gsm_symbolic cmudict chatterbot django_fr pydoc kjv gsm8k hub local".split()
    )
    for file in files:
        lines = file.read_text().splitlines()
        content = yaml.safe_load("\n".join(lines))
        assert list(content) == KEYS and content["name"] == file.stem
        for number, line in enumerate(lines):
            if re.match(r"\w+:", line):  # a comment beside the key, or on the line above
                assert "# " in line or lines[number - 1].startswith("# ")
