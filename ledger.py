"""What has become of every record: files that are whole or not there, and journals that only grow.

    ledger/read.json             sizes of the shards, what they were read from, and the settings
    ledger/read/00000.jsonl      the records of a shard: id, src_video, tgt_video, prompt, what their row brought
    ledger/score/00000.jsonl     of its open records the id and what that stage added, a line each
    ledger/score/00001.part      the journal of a shard under work: a line as soon as a record is done

A record is open while it has no `status`; a stage may give it one, "rejected" or "failed", with `stage` and `reason`,
and later stages do not see it. A killed run repeats at most the records it was busy with; answers were paid for.
"""

import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from media import whole_file


def parsed(text):
    """A text of JSON -> its value; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json_lines(path):
    with open(path, encoding="utf-8") as file:
        try:
            return [json.loads(line) for line in file]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def write_json_lines(path, rows):
    """Whole, or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path, mode="ab+"):
    """Open a file to which one process at a time writes; ValueError for the second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another run writes to it; wait for it, or give another --out") from None
        yield file


@contextmanager
def appended(path, sync=False):
    """Yield (the lines of JSON that were written before, a function that adds one at once; sync: and through a power
    cut)."""
    with locked(path) as file:
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # what died while writing leaves half a line, or zeros
        file.truncate(len(whole))

        def add(row):
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            sync and os.fsync(file.fileno())

        yield [row for row in map(parsed, whole.splitlines()) if isinstance(row, dict)], add


def is_open(row):
    return "status" not in row


def has_failed(row):
    return row.get("status") == "failed" and row["stage"] != "read"


def reopened(row):
    return {key: value for key, value in row.items() if key not in ("status", "stage", "reason", "tuning")}


class Ledger:
    """The records of a run in `out`, after each of `stages`."""

    def __init__(self, out, stages):
        self.out, self.folder, self.stages = Path(out), Path(out) / "ledger", ("read", *stages)

    @property
    def told(self):
        """read.json; None until the tables were read to the end."""
        path = self.folder / "read.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def path(self, stage, shard, suffix=".jsonl"):
        return self.folder / stage / f"{shard:05d}{suffix}"

    def done(self, stage, shard):
        return self.path(stage, shard).is_file()

    def write(self, stage, shard, rows):
        write_json_lines(self.path(stage, shard), rows)
        self.path(stage, shard, ".part").unlink(missing_ok=True)

    def rows(self, stage, shard):
        """The records of a shard as they are after `stage`."""
        rows, lost = read_json_lines(self.path("read", shard)), "has lost records (a crash?): delete it"
        if len(rows) != self.told["shards"][shard]:
            raise ValueError(f"{self.path('read', shard)}: {lost} and read.json")
        for name in self.stages[1 : self.stages.index(stage) + 1]:
            found = {row["id"]: row for row in read_json_lines(self.path(name, shard))}
            for row in filter(is_open, rows):
                if row["id"] not in found:
                    raise ValueError(f"{self.path(name, shard)}: {lost}")
                row.update(found[row["id"]])
        return rows

    def todo(self, stage, shards):
        return [shard for shard in shards if not self.done(stage, shard)]

    def lines(self, stage, shard):
        """What a stage has of a shard, done or under work."""
        if self.done(stage, shard):
            return read_json_lines(self.path(stage, shard))
        with appended(self.path(stage, shard, ".part")) as (lines, _):
            return lines

    def reopen_failed(self, shard):
        """Open the failed records of a shard again: from their first stage on, files become journals without them."""
        begun = {stage: self.lines(stage, shard) for stage in self.stages}
        first = next((i for i, stage in enumerate(self.stages) if any(map(has_failed, begun[stage]))), None)
        if first is None:
            return
        for stage in self.stages[: max(first, 1) - 1 : -1]:  # last first: a kill leaves none done after one that is not
            write_json_lines(self.path(stage, shard, ".part"), [row for row in begun[stage] if not has_failed(row)])
            self.path(stage, shard).unlink(missing_ok=True)
        self.write("read", shard, [reopened(row) if has_failed(row) else row for row in begun["read"]])
