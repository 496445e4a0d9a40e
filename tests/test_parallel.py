"""Tests of parallel.py: ranks, FSDP2, sequence parallelism"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

import train
from conftest import HOUSE, lessons, losses, same_course
from load import valid_checkpoints


def on_two_ranks(tmp_path, runs, first=""):
    """Trainings on the same two CPU processes, after some lines of Python."""
    lines = ["import sys", f"sys.path.insert(0, {str(HOUSE)!r})", "import parallel, train", first]
    lines += ["parallel.dist.init_process_group('gloo')", f"for words in {runs!r}:", "    train.main(words)"]
    (tmp_path / "all.py").write_text("\n".join([*lines, "parallel.dist.destroy_process_group()\n"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "all.py")]
    done = subprocess.run(
        torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    print(done.stderr[-3000:])
    return done


def test_ddp_fsdp_and_sequence_parallelism_give_the_losses_of_one_process_and_resume_on_another_number(
    tmp_path, lesson
):
    short, long = ["steps=3", "pixels=4096,6144"], ["steps=12", "pixels=4096,6144", "ema=0.9"]
    muon = [*short, "optimizer=muon"]
    lora = ["--preset", "lora", "--val", lesson, "--val-every", "2"]
    student, turns = ["--preset", "distil"], ["steps=6", "pixels=4096", "dit_lora_rank=2", "student=1000,700"]
    small = [*short, "dit_lora_rank=2", "dit_lora_alpha=4"]
    odd = ["steps=3", "pixels=3072", "image=0"]  # a token a frame, three or four in a sequence: not for two to share
    train.main(lessons(lesson, tmp_path / "one", "--save-every", "8", settings=long))
    fsdp = ["--parallel", "fsdp"]
    runs = {"ddp": ([], long), "fsdp": (fsdp, long), "sp": (["--sp", "2"], short), "odd": (["--sp", "2"], odd),
            "matrices": (fsdp, muon), "half": (["--sp", "2", *fsdp, "--dtype", "bfloat16"], short),
            "lora": ([*lora, *fsdp], small),
            "student": ([*student, *fsdp], turns), "student ddp": ([*student, "--parallel", "ddp"], turns),
            "lora16": ([*lora, "--dtype", "bfloat16", "--parallel", "ddp"], small)}  # fmt: skip
    runs = [lessons(lesson, tmp_path / name, "--save-every", "8", *flags, settings=settings)
            for name, (flags, settings) in runs.items()]  # fmt: skip
    assert on_two_ranks(tmp_path, runs).returncode == 0
    train.main(lessons(lesson, tmp_path / "short", settings=short))
    train.main(lessons(lesson, tmp_path / "muon", settings=muon))
    train.main(lessons(lesson, tmp_path / "whole", settings=odd))
    train.main(lessons(lesson, tmp_path / "alone", *lora, settings=small))
    train.main(lessons(lesson, tmp_path / "distil", *student, settings=turns))
    for name in ("student", "student ddp"):
        assert same_course(tmp_path / name, tmp_path / "distil")
    assert same_course(tmp_path / "lora", tmp_path / "alone") and same_course(
        tmp_path / "lora16", tmp_path / "alone", 3e-2
    )
    assert same_course(tmp_path / "odd", tmp_path / "whole")
    assert len(losses(tmp_path / "fsdp")) == 12
    assert same_course(tmp_path / "matrices", tmp_path / "muon") and losses(tmp_path / "muon") != losses(
        tmp_path / "short"
    )
    assert same_course(tmp_path / "ddp", tmp_path / "one") and same_course(tmp_path / "fsdp", tmp_path / "one")
    assert same_course(tmp_path / "sp", tmp_path / "short") and same_course(tmp_path / "half", tmp_path / "short", 3e-2)
    shutil.rmtree(tmp_path / "fsdp" / "step-000012")
    train.main(lessons(lesson, tmp_path / "fsdp", "--resume", "auto", settings=long))  # 4 more steps on one process
    assert same_course(tmp_path / "fsdp", tmp_path / "one")
    for name in ("weights", "ema"):
        a, b = (load_file(tmp_path / run / "step-000012" / f"{name}.safetensors") for run in ("one", "fsdp"))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_sharded_ranks_do_not_wait_for_ever_where_one_kind_of_data_trains_what_another_has_not(tmp_path, lesson):
    kinds = ["steps=2", "batch=2"]  # a batch a rank, of which one is an image, the other a clip
    runs = [
        (1, [*kinds, "video=1"]),
        (3, [*kinds, "trains=ref_embedder", "video=0"]),
        (3, [*kinds, "model.source=add_learned", "optimizer=muon"]),
    ]
    words = [[lessons(lesson, tmp_path / f"{name}{i}", *flags, stage=stage, settings=settings)
              for i, (stage, settings) in enumerate(runs)]
             for name, flags in (("one", []), ("two", ["--parallel", "fsdp"]))]  # fmt: skip
    for run in words[0]:
        train.main(run)
    assert on_two_ranks(tmp_path, words[1]).returncode == 0
    assert all(same_course(tmp_path / f"two{i}", tmp_path / f"one{i}", 1e-4) for i in range(len(runs)))


def test_a_sample_that_one_rank_cannot_read_is_left_out_by_all(tmp_path, lesson):
    lost = """
def read_pair(row, shape, read=train.read_pair):
    if parallel.dist.get_rank() and row.target.endswith(".png"):
        raise train.MediaError("is not here")
    return read(row, shape)
train.read_pair = read_pair"""
    more = [["--sample-every", "1", "--sample-steps", "1"]]
    done = on_two_ranks(
        tmp_path,
        [lessons(lesson, tmp_path / "run", "--parallel", "fsdp", *flags, settings=["steps=1"]) for flags in more],
        lost,
    )
    assert done.returncode == 0 and "no sample of image: is not here" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == [
        "step-000001-ref.mp4",
        "step-000001-video.mp4",
    ]


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(tmp_path, lesson):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command, run = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, tmp_path / "run")], tmp_path / "run"
    ranks = [
        subprocess.Popen(command, env=both | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.DEVNULL) for r in "01"
    ]
    try:
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
            time.sleep(0.02)
            assert [rank.poll() for rank in ranks] == [None, None]
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(300) for rank in ranks] == [0, 0]
        assert valid_checkpoints(run)[-1].name == f"step-{len(losses(run)):06d}"
    finally:
        for rank in ranks:
            rank.kill()
