"""What has become of every record: files that are whole or not there, and journals that only grow.

    ledger/read.json             sizes of the shards, and what they were read from
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
    """A line of JSON -> its value; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json_lines(path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not isinstance(found := parsed(line), dict):
                raise ValueError(f"{path}, line {number}: is not a record in JSON")
            yield found


def write_json_lines(path, rows):
    """Whole, or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appended(path, sync=False):
    """Yield (the lines of JSON that were written before, a function that adds one at once; sync: and through a power
    cut). One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another run writes to it; wait for it, or give another --out") from None
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # what died while writing leaves half a line, or zeros
        file.truncate(len(whole))

        def add(row):
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            sync and os.fsync(file.fileno())

        yield [row for row in map(parsed, whole.splitlines()) if isinstance(row, dict)], add


@contextmanager
def journal(path):
    """`appended`, the lines by their ids."""
    with appended(path) as (lines, add):
        yield {row["id"]: row for row in lines}, add


def is_open(row):
    return "status" not in row


class Ledger:
    """The records of a run in `out`, after each of `stages`."""

    def __init__(self, out, stages):
        self.out, self.folder, self.stages = Path(out), Path(out) / "ledger", ("read", *stages)

    def path(self, stage, shard):
        return self.folder / stage / f"{shard:05d}.jsonl"

    def part(self, stage, shard):
        return self.path(stage, shard).with_suffix(".part")

    def done(self, stage, shard):
        return self.path(stage, shard).is_file()

    def write(self, stage, shard, rows):
        write_json_lines(self.path(stage, shard), rows)
        self.part(stage, shard).unlink(missing_ok=True)

    def rows(self, stage, shard):
        """The records of a shard as they are after `stage`."""
        rows = self.lines("read", shard)
        self.nothing_lost("read", shard, self.told["shards"][shard] - len(rows))
        for name in self.stages[1 : self.stages.index(stage) + 1]:
            found, waiting = self.lines(name, shard), [row for row in rows.values() if is_open(row)]
            self.nothing_lost(name, shard, sum(row["id"] not in found for row in waiting))
            for row in waiting:
                row.update(found[row["id"]])
        return list(rows.values())

    def lines(self, stage, shard):
        """{id: line} that a stage has of a shard, done or under work."""
        if self.done(stage, shard):
            return {row["id"]: row for row in read_json_lines(self.path(stage, shard))}
        if not self.part(stage, shard).is_file():
            return {}
        with journal(self.part(stage, shard)) as (found, _):
            return found

    def nothing_lost(self, stage, shard, lost):
        if lost:
            too = " and read.json" if stage == "read" else ""
            raise ValueError(f"{self.path(stage, shard)}: has lost {lost} records (a crash?): delete it{too}")

    @property
    def told(self):
        """read.json; None until the tables were read to the end."""
        path = self.folder / "read.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def all_done(self, stage):
        return self.told is not None and all(self.done(stage, shard) for shard in range(len(self.told["shards"])))

    def reopen_failed(self, shard):
        """Open the failed records of a shard again: from the stage where they failed on, journals without them."""
        failed = lambda row: row.get("status") == "failed" and row["stage"] != "read"
        begun = [list(self.lines(stage, shard).values()) for stage in self.stages]
        first = next((i for i, rows in enumerate(begun) if any(map(failed, rows))), None)
        if first is None:
            return
        for stage, rows in reversed(list(zip(self.stages, begun))[max(first, 1) :]):
            if rows:  # the last stage first: killed in between, none tells of what is open again
                write_json_lines(self.part(stage, shard), [row for row in rows if not failed(row)])
            self.path(stage, shard).unlink(missing_ok=True)
        if first == 0:  # they failed in the run whose ledger this one read
            ended = ("status", "stage", "reason", "tuning")
            opened = lambda row: {k: v for k, v in row.items() if k not in ended} if failed(row) else row
            write_json_lines(self.path("read", shard), map(opened, begun[0]))


@contextmanager
def only_run(ledger, rank):
    """Two runs in one folder would mix their work: the second is refused."""
    ledger.folder.mkdir(parents=True, exist_ok=True)
    with (ledger.folder / f"lock.{rank}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{ledger.out}: another curate.py is at work there; wait, or give another --out") from None
        yield
