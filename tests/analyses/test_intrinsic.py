import pytest
from oracle import result

from peftlab.analyses.intrinsic import analyse, answer, argument, sizes_of
from peftlab.errors import InputError
from peftlab.recorded import Record


def made(tmp_path, n, d, train, *, seed=0, lr=1e-3, base=10.0, more=(), name="said", data="f"):
    """A record as `read_record` gives it."""
    method = {"_target_": f"peftlab.methods.{name}.X", "dimension": d, "sites": "all", "lr": lr}
    config = {
        "method": {**method, **dict(more)},
        "optimizer": {"lr": lr},
        "epochs": 3,
        "seed": seed,
    }
    losses = {"train_bits_per_token": train, "test_bits_per_token": train + 1}
    record = {
        "run_id": str(n),
        "model": {"name": "toy", "sha256": "a" * 64},
        "dataset": {"fingerprint": data},
        "method": {"trainable_params": d + 5},
        "base": {"train_bits_per_token": base},
        "final": losses,
    }
    return Record(tmp_path / str(n), config, record, [])


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({10: 1.0, 100: 8.9, 1000: 9.0, 10000: 10.0}, "100 < d90 ≤ 1000"),
        ({10: 9.5, 100: 10.0}, "d90 ≤ 10 (no smaller size was tried)"),
        ({10: 1.0, 100: 8.0}, "d90 > 100: no size that was tried reaches 90 %"),
        (
            {10: 1.0, 20: 9.2, 40: 8.0, 80: 10.0},
            "10 < d90 ≤ 20; but not at 40, so tuning or seeds decide",
        ),
    ],
)
def test_the_smallest_that_was_tried(gains, said):
    assert answer(gains, 10.0, 0.9) == said


def test_best_setting_at_each_size_is_a_mean_over_seeds(tmp_path):
    runs = [
        made(tmp_path, 0, 100, 4.0, lr=1e-3, seed=0),
        made(tmp_path, 1, 100, 7.0, lr=1e-3, seed=1),  # mean 5.5: one lucky seed does not win
        made(tmp_path, 2, 100, 5.0, lr=1e-2, seed=0),
        made(tmp_path, 3, 10, 9.0),
    ]
    small, large = sizes_of(runs, "dimension")
    assert (small.d, small.train, small.settings, small.seeds) == (10, 9.0, 1, 1)
    assert (large.d, large.train, large.test, large.settings) == (100, 5.0, 6.0, 2)
    found = analyse(runs, reference=None, dimension=None, share=0.9)
    assert found.title == "10 < d90 ≤ 100"
    assert [row[-1] for row in found.rows] == pytest.approx([0.2, 1.0])
    assert found.rows[1][:2] == (100, 105)


def test_which_argument_is_the_size(tmp_path):
    runs = [made(tmp_path, n, d, 5.0, lr=lr) for n, d, lr in ((0, 1, 1e-3), (1, 2, 1e-4))]
    assert argument(runs, None) == "dimension"
    mixed = [*runs, made(tmp_path, 2, 2, 5.0, more={"dimension": 1, "gamma": 2.0})]
    assert argument(mixed, None) == "dimension"  # gamma has one value only, where it is there
    several = [*runs, *(made(tmp_path, n, 4, 5.0, more={"gamma": n}) for n in (3, 4))]
    with pytest.raises(InputError, match="--dimension=None: the one .*dimension, gamma"):
        argument(several, None)
    assert argument(several, "gamma") == "gamma"
    with pytest.raises(InputError, match="--dimension=lr: one in which the runs differ"):
        argument(several, "lr")
    with pytest.raises(InputError, match="these differ in none"):
        argument(runs[:1], None)


def test_what_cannot_be_compared(tmp_path):
    runs = [made(tmp_path, 0, 1, 5.0), made(tmp_path, 1, 2, 4.0)]
    for other, told in (
        (made(tmp_path, 2, 4, 3.0, data="g"), "a run on the model, data and epochs"),
        (made(tmp_path, 3, 4, 3.0, name="did"), "a run of the one method"),
    ):
        with pytest.raises(InputError, match=told):
            analyse([*runs, other], reference=None, dimension=None, share=0.9)
    worse = [made(tmp_path, n, n + 1, 11.0) for n in range(2)]
    with pytest.raises(InputError, match="one that gains; its train loss is 11"):
        analyse(worse, reference=None, dimension=None, share=0.9)


def test_runs(finished, ask):
    runs = [finished("method=said", f"method.dimension={d}", "optimizer.lr=0.05") for d in (4, 512)]
    whole = finished("method=lora", "method.rank=4", "seed=1")
    losses = [result(run)["final"]["train_bits_per_token"] for run in (*runs, whole)]
    base = result(whole)["base"]["train_bits_per_token"]
    found = ask("intrinsic", *runs, "--reference", whole, "--share", 0.5)
    shares = [(base - loss) / (base - losses[-1]) for loss in losses[:2]]
    assert [row["gain of the reference's"] for row in found["rows"]] == pytest.approx(shares)
    assert [row["dimension"] for row in found["rows"]] == [4, 512]
    assert found["title"] == answer(dict(zip((4, 512), shares, strict=True)), 1, 0.5)
    assert found["options"]["reference"] == str(whole)
    assert found["figures"][0]["traces"][0]["y"] == pytest.approx(shares)
