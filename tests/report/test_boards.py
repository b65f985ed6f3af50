"""What may be compared, and which run is a method's best: by train loss alone."""

import re

import pytest
from made import BASE, confirm, make

from peftlab.cards import method_names
from peftlab.config import PACKAGE
from peftlab.report.boards import boards_of
from peftlab.report.records import read_runs


def boards(folder):
    return boards_of(read_runs([folder]))


def ranking(board):
    return {c.label: (s.train.mean, s.test.mean, len(s.runs)) for c, s in board.ranked}


def test_the_best_is_chosen_by_train_loss_never_by_test(tmp_path):
    make(tmp_path / "a", train=3.0, test=9.0, config={"optimizer.lr": 1e-3})
    make(tmp_path / "b", train=3.1, test=1.0, config={"optimizer.lr": 1e-4})
    make(tmp_path / "c", "ia3", train=2.5, test=8.0)
    ((board,), apart) = boards(tmp_path)
    assert ranking(board) == {"ia3": (2.5, 8.0, 1), "lora": (3.0, 9.0, 1)}
    assert list(ranking(board)) == ["ia3", "lora"] and not apart
    assert board.base == (BASE, BASE + 0.1)
    assert [c.n_trials for c, _ in board.ranked] == [1, 2]
    assert "1 to 2 trials" in board.notes[0] and "One seed each" in board.notes[1]


def test_a_best_rate_at_the_end_of_those_tried_is_told(tmp_path):
    def tune(method, best, rates=(1e-5, 1e-4, 1e-3, 5e-3, 1e-2)):
        for n, lr in enumerate(rates):
            train = 3.0 if lr == best else 4.0
            make(tmp_path / method / str(n), method, train=train, config={"optimizer.lr": lr})

    tune("top", 1e-2)
    tune("below_the_top", 5e-3)  # 0.1 of the range from its end
    tune("bottom", 1e-5)
    tune("few", 1e-2, rates=(1e-5, 1e-4, 1e-3, 1e-2))
    ((board,), _) = boards(tmp_path)
    (told,) = (note for note in board.notes if "learning rate" in note)
    assert told.endswith("others may do better: bottom, top.")


def test_seeds_of_a_setting_are_averaged_and_counted_once(tmp_path):
    for seed, train in enumerate((3.0, 3.2, 3.7)):
        make(tmp_path / f"s{seed}", train=train, seed=seed)
    make(tmp_path / "again", train=3.2, seed=1, config={"threads": 4, "tracking": {"mode": "x"}})
    make(tmp_path / "lucky", train=3.25, config={"optimizer.lr": 1e-2})
    ((board,), _) = boards(tmp_path)
    ((contender, best),) = board.ranked
    assert best.train.mean == pytest.approx(3.25) and best.train.spread is None
    make(tmp_path / "unlucky", train=3.5, seed=1, config={"optimizer.lr": 1e-2})
    ((board,), _) = boards(tmp_path)
    ((contender, best),) = board.ranked
    assert best.train.mean == pytest.approx(3.3) and len(best.runs) == 3
    assert best.train.spread == pytest.approx(0.13**0.5)  # (0.09 + 0.01 + 0.16) / 2
    assert contender.n_trials == 2 and len(best.records) == 4


def test_a_confirmed_trial_counts_by_its_confirming_seeds(tmp_path):
    sweep = tmp_path / "sweep"
    for trial, train in enumerate((2.0, 2.1, 2.2)):
        make(sweep / str(trial), train=train, trial=trial, config={"optimizer.lr": 10.0**-trial})
    for trial, values in {0: (2.9, 3.1), 1: (2.6, 2.8)}.items():
        for seed, train in enumerate(values, start=1):
            lr = {"optimizer.lr": 10.0**-trial}
            make(sweep / f"{trial}-seed{seed}", train=train, trial=trial, seed=seed, config=lr)
    confirm(sweep, {0: [1, 2], 1: [1, 2]})
    ((board,), _) = boards(tmp_path)
    ((contender, best),) = board.ranked
    # trial 2 was not confirmed; trial 1 is better than trial 0 on seeds that chose nothing
    assert best.train.mean == pytest.approx(2.7) and [r.seed for r in best.runs] == [1, 2]
    assert best.tuned_to == 2.1 and contender.n_trials == 3


def test_a_setting_that_diverges_on_a_seed_is_not_chosen(tmp_path):
    make(tmp_path / "a0", train=2.0, config={"optimizer.lr": 1.0})
    make(tmp_path / "a1", seed=1, status="diverged", config={"optimizer.lr": 1.0})
    make(tmp_path / "b0", train=3.0)
    make(tmp_path / "b1", seed=1, status="failed")  # a machine that died says nothing
    make(tmp_path / "c", "ia3", status="diverged")
    make(tmp_path / "d", "ia3", status="pruned", config={"optimizer.lr": 1.0})
    ((board,), _) = boards(tmp_path)
    assert ranking(board) == {"lora": (3.0, 3.5, 1)}
    assert "ia3 is not ranked: 1 diverged, 1 pruned." in board.notes
    assert {c.label: c.n_trials for c in board.contenders} == {"ia3": 2, "lora": 2}


@pytest.mark.parametrize(
    ("change", "labels", "told"),
    [
        ({"result": {"model.sha256": "b" * 64}}, ["toy (aaaaaaaa)", "toy (bbbbbbbb)"], "sha256"),
        ({"result": {"dataset.fingerprint": "e" * 64}}, ["words (fingerprint eeeeeeee)"], "finger"),
        ({"result": {"schema": 2}}, ["words (schema 1)", "words (schema 2)"], "schema (1, 2)"),
        ({"config": {"epochs": 9}}, ["words (epochs 3)", "words (epochs 9)"], "epochs (3, 9)"),
        (
            {"result": {"dataset.fingerprint": "e" * 64}, "config": {"dataset.train_size": 50}},
            ["words (train_size 100)", "words (train_size 50)"],
            "train_size (100, 50)",
        ),
    ],
)
def test_what_may_not_be_compared_is_kept_apart_and_told(change, labels, told, tmp_path):
    make(tmp_path / "one", train=3.0)
    make(tmp_path / "other", train=2.0, **change)
    found, (line,) = boards(tmp_path)
    assert len(found) == 2 and all(len(board.ranked) == 1 for board in found)
    names = {board.model for board in found} | {board.data for board in found}
    assert set(labels) <= names
    assert line.startswith("toy on words: 2 kinds of runs are kept apart") and told in line


def test_another_name_is_another_board_without_a_word(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "other", result={"dataset.name": "rhymes", "dataset.fingerprint": "e" * 64})
    found, apart = boards(tmp_path)
    assert [board.data for board in found] == ["rhymes", "words"] and not apart


def test_other_optimizer_precision_or_quantisation_is_told_in_the_name(tmp_path):
    for n in range(3):
        make(tmp_path / f"usual{n}", train=3.0, seed=n)
    lora_plus = "peftlab.optim.lora_plus"
    make(tmp_path / "plus", train=2.0, config={"optimizer._target_": lora_plus})
    make(tmp_path / "nf4", train=4.0, config={"model.quantize": "nf4"}, result={"base": None})
    make(tmp_path / "bf16", train=5.0, config={"precision": "bf16"})
    ((board,), apart) = boards(tmp_path)
    assert list(ranking(board)) == ["lora (lora_plus)", "lora", "lora (nf4)", "lora (bf16)"]
    assert board.notes[0] == "Unless a name says otherwise: AdamW, fp32, not quantised."
    assert not apart


def test_no_method_is_named_in_the_reports_own_code():
    sources = [f for f in (PACKAGE / "report").rglob("*") if f.suffix in (".py", ".js", ".html")]
    text = "\n".join(file.read_text() for file in sources)
    assert len(sources) > 15
    assert [name for name in method_names() if re.search(rf"[\"'`]{name}[\"'`]", text)] == []
