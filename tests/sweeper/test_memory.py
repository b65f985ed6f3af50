"""A process that runs trial after trial holds no more after many than after some."""

from peftlab.config import HOME

WARM, END = 16, 28  # trials; scripts/bench_sweeps.py does 200


def test_memory_files_and_threads_stay_flat(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HOME / "scripts")
    from bench_sweeps import watched

    rows = watched(tmp_path, ["tracking=none", "study=flat", f"hydra.sweeper.n_trials={END}"])
    assert len(rows) == END
    warm, end = rows[WARM - 1], rows[END - 1]
    assert end["open files"] == warm["open files"] and end["threads"] == warm["threads"]
    grown = {what: (end[what] - warm[what]) / (END - WARM) for what in ("MiB", "objects")}
    assert grown["MiB"] < 1  # a backbone is 9, a run's optimizer and method up to 5
    assert grown["objects"] < 200  # a config of Hydra's is 1200
