"""scripts/soak.py, small: docs/reliability.md has the figures of 500 trials."""

import pytest

from peftlab.config import HOME

N = 14


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(HOME / "scripts")
    import soak

    return soak


def test_short_trials_hold_nothing(soak, tmp_path):
    rows = soak.soak(tmp_path, N)
    assert len(rows) == N and all(row["CPU seconds"] > 0 for row in rows)
    # In so few trials caches still fill: a backbone that was kept, of 9 MiB, would stand out.
    # Objects are counted in tests/sweeper/test_memory.py, behind the last 16 results.
    assert soak.grown(rows, warm=4, most={"MiB": 4.0}, slower=3.0) == []


def test_what_grows_is_told(soak):
    flat = {"MiB": 500.0, "open files": 9, "threads": 3, "objects": 10_000, "CPU seconds": 0.5}
    rows = [dict(flat) for _ in range(60)]
    assert soak.grown(rows) == []
    for what, step, word in (
        ("MiB", 1.0, "MiB: 1 more with each trial"),
        ("open files", 1, "open files: "),
        ("threads", 1, "threads: "),
        ("objects", 100, "objects: 100 more with each trial"),
        ("CPU seconds", 0.05, "a trial takes "),
    ):
        growing = [row | {what: row[what] + n * step} for n, row in enumerate(rows)]
        (line,) = soak.grown(growing)
        assert line.startswith(word), line
