"""Real runs of tiny_gpt2: read from their folders, and from W&B's records alone."""

import json
import shutil
import struct

import pytest
from conftest import ROWS

from peftlab.__main__ import main
from peftlab.report.boards import boards_of
from peftlab.report.curves import curve
from peftlab.report.offline import NOTE, add_wandb, read_wandb, rows
from peftlab.report.records import BrokenFile, Found, read_runs

WORDS = (
    "train -m method=lora,ia3 seed=0,1 model=tiny_gpt2 dataset=local dataset.test_size=4 epochs=1 "
    "dataset.train_size=8 precision=fp32 threads=1 batch=4 study=grid tracking.mode=offline"
).split()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A sweep folder of four runs: two methods, two seeds, recorded by W&B offline as well."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = [f"dataset.path={folder / 'rows.jsonl'}", f"output={folder / 'outputs'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, *more]) == 0
    return folder / "outputs" / "grid"


@pytest.fixture
def records(real, tmp_path):
    """W&B's folders of the four runs, without the run folders around them."""
    for run in sorted(real.glob("*/wandb")):
        shutil.copytree(run, tmp_path / run.parent.name)
    return tmp_path


def test_real_runs_are_ranked(real, capfd):
    (board,), apart = boards_of(read_runs([real]))
    assert not apart and board.data == "local"
    results = [json.loads(file.read_text()) for file in real.glob("*/result.json")]
    for contender, best in board.ranked:
        own = [r["final"] for r in results if r["method"]["name"] == contender.label]
        assert len(own) == 2 and len(best.runs) == 2
        for split in ("train", "test"):
            mean = sum(final[f"{split}_bits_per_token"] for final in own) / 2
            assert getattr(best, split).mean == pytest.approx(mean)
    assert {c.label for c, _ in board.ranked} == {"ia3", "lora"}


def test_wandb_tells_what_the_run_folder_tells(real, records):
    from_folder = {r.run_id: r for r in read_runs([real]).records}
    found = Found([], [], {})
    add_wandb(found, [records])
    assert len(found.records) == 4 and found.warnings == [NOTE]
    for record in found.records:
        same = from_folder[record.run_id]
        for key in ("train", "test", "base", "seed", "trial", "method", "trainable_params", "data"):
            assert getattr(record, key) == getattr(same, key), key
        for key in ("status", "precision", "seconds", "memory_bytes", "total_params", "model"):
            assert getattr(record, key) == getattr(same, key), key
        assert record.setting == same.setting and curve(record.rows()) == curve(same.rows())
        assert record.fingerprint.startswith("wb") and record.merged == "?"


def test_a_run_that_is_there_twice_counts_once(real, records, capfd):
    assert main(["report", str(real), "--wandb", str(records), "--csv"]) == 0
    captured = capfd.readouterr()
    assert len(captured.out.splitlines()) == 3 and not captured.err
    shutil.rmtree(records / "0")
    assert main(["report", "--wandb", str(records), "--csv"]) == 0
    captured = capfd.readouterr()
    assert len(captured.out.splitlines()) == 3 and NOTE in captured.err


def test_wandb_beside_other_runs_is_kept_apart(real, records, tmp_path, capfd):
    shutil.copytree(real / "0", tmp_path / "kept" / "0", ignore=shutil.ignore_patterns("wandb"))
    assert main(["report", str(tmp_path / "kept"), "--wandb", str(records), "--csv"]) == 0
    captured = capfd.readouterr()
    assert "2 kinds of runs are kept apart, as they differ in sha256" in captured.err
    assert len(captured.out.splitlines()) == 1 + 1 + 2


def test_torn_changed_and_foreign_files_are_told(records, capfd):
    (file,) = (records / "0").rglob("*.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # killed: no summary, so no status
    with pytest.raises(BrokenFile, match="has not ended"):
        read_wandb(file)
    at = 20  # within the first message: before it are the file's 7 bytes and the piece's 7
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(BrokenFile, match="was changed"):
        read_wandb(file)
    file.write_bytes(b"something else")
    assert main(["report", "--wandb", str(records), "--csv"]) == 0
    captured = capfd.readouterr()
    assert f"peftlab: {file}: not a W&B record; left out" in captured.err.splitlines()
    file.write_bytes(whole)
    assert read_wandb(file).trial == 0


def test_pieces_over_several_blocks_are_joined(tmp_path):
    """A message longer than two blocks, and one that begins where no header fits any more."""
    import zlib

    from wandb.proto import wandb_internal_pb2 as proto

    from peftlab.wandb_record import BLOCK, START, messages

    long, short = proto.Record(num=1), proto.Record(num=2)
    item = long.history.item.add()
    item.key, item.value_json = "text", "x" * 80_000
    data, written = bytearray(START), []
    for message in (long, short):
        rest, first = message.SerializeToString(), True
        while rest or first:
            room = BLOCK - len(data) % BLOCK
            if room < 7:
                data += bytes(room)
                continue
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}
            number = kind[first, not rest]
            check = zlib.crc32(bytes([number]) + piece)
            data += struct.pack("<IHB", check, len(piece), number) + piece
            written.append(number)
            first = False
    assert written == [2, 3, 4, 1]
    assert list(messages(bytes(data))) == [long, short]
    assert list(messages(bytes(data[:-1]))) == [long]


def test_a_history_that_ends_without_a_number():
    history = [
        {"step": 0, "epoch/test_bits_per_token": 3.5},
        {"step": 1, "train/bits_per_token": 2.5, "train/lr": 0.1},
        {"step": 2, "train/bits_per_token": "NaN"},
        {"step": 3, "train/bits_per_token": float("inf")},
    ]
    told = [(r["step"], r["phase"], r["split"], r["bits_per_token"]) for r in rows(history)]
    assert told == [
        (0, "eval", "test", 3.5),
        (1, "step", "train", 2.5),
        (2, "step", "train", None),
        (3, "step", "train", None),
    ]
