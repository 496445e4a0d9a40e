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
from conftest import HOUSE, lessons, losses, same_course, steps_of
from load import valid_checkpoints


def on_two_ranks(tmp_path, runs):
    """Trainings on the same two CPU processes."""
    lines = ["import sys", f"sys.path.insert(0, {str(HOUSE)!r})", "import parallel, train"]
    lines += ["parallel.dist.init_process_group('gloo')", f"for words in {runs!r}:", "    train.main(words)"]
    (tmp_path / "all.py").write_text("\n".join([*lines, "parallel.dist.destroy_process_group()\n"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "all.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, capture_output=True, text=True, env=environment, timeout=900)
    print(done.stderr[-3000:])
    return done


def test_every_way_to_share_work_gives_the_losses_of_one_process_and_resumes_on_another_number(tmp_path, lesson, held):
    short, long = ["steps=3", "pixels=4096,6144"], ["steps=8", "pixels=4096,6144", "ema=0.9", "save_every=5"]
    lora = ["--preset", "lora", "--val", held]
    small = [*short, "val_every=2", "dit_lora_rank=2", "dit_lora_alpha=4"]
    odd = ["steps=3", "pixels=3072", "image=0"]  # a token a frame, three or four in a sequence: not for two to share
    turns = ["steps=6", "pixels=4096", "global_batch=2", "dit_lora_rank=2", "student=1000,700"]
    distil, fsdp, ddp, half = ["--preset", "distil"], "parallel=fsdp", "parallel=ddp", "dtype=bfloat16"
    # One process: flags and settings. Two: what it is compared with, what is different, how near
    alone = {"long": ([], long), "short": ([], short), "muon": ([], [*short, "optimizer=muon"]), "odd": ([], odd),
             "lora": (lora, small), "student": (distil, turns)}  # fmt: skip
    ranks = {"ddp": ("long", [], [], 1e-5), "fsdp": ("long", [], [fsdp], 1e-5), "sp": ("short", ["--sp", 2], [], 1e-5),
             "uneven": ("odd", ["--sp", 2], [], 1e-5), "matrices": ("muon", [], [fsdp], 1e-5),
             "half": ("short", ["--sp", 2], [fsdp, half], 3e-2), "lora_fsdp": ("lora", [], [fsdp], 1e-5),
             "lora16": ("lora", [], [half, ddp], 3e-2), "student_fsdp": ("student", [], [fsdp], 1e-5),
             "student_ddp": ("student", [], [ddp], 1e-5)}  # fmt: skip
    words = lambda name, of, flags=(), more=(): lessons(
        lesson, tmp_path / name, *alone[of][0], *flags, settings=[*alone[of][1], *more]
    )
    done = on_two_ranks(tmp_path, [words(name, of, flags, more) for name, (of, flags, more, _) in ranks.items()])
    assert done.returncode == 0
    for name in alone:
        train.main(words(name, name))
    assert losses(tmp_path / "muon") != losses(tmp_path / "short")
    for name, (of, _, _, tolerance) in ranks.items():
        assert same_course(tmp_path / name, tmp_path / of, tolerance), name
    shutil.rmtree(tmp_path / "fsdp" / "step-000008")
    train.main(words("fsdp", "long", ["--resume", "auto"]))  # 3 more steps on one process
    assert len(losses(tmp_path / "fsdp")) == 8 and same_course(tmp_path / "fsdp", tmp_path / "long")
    for name in ("weights", "ema"):
        a, b = (load_file(tmp_path / run / "step-000008" / f"{name}.safetensors") for run in ("long", "fsdp"))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_sharded_ranks_do_not_wait_for_ever_where_one_kind_of_data_trains_what_another_has_not(tmp_path, lesson):
    kinds = ["steps=2", "batch=2"]  # a batch a rank, of which one is an image, the other a clip
    runs = {"mixed": (1, [*kinds, "video=1"]), "ref": (3, [*kinds, "trains=ref_embedder", "video=0"]),
            "learned": (3, [*kinds, "model.source=add_learned", "optimizer=muon"])}  # fmt: skip
    words = lambda out, name, *more: lessons(lesson, out, stage=runs[name][0], settings=[*runs[name][1], *more])
    assert on_two_ranks(tmp_path, [words(tmp_path / name, name, "parallel=fsdp") for name in runs]).returncode == 0
    for name in runs:
        train.main(words(tmp_path / f"one_{name}", name))
        assert same_course(tmp_path / name, tmp_path / f"one_{name}", 1e-4)


def test_a_signal_to_one_of_two_ranks_saves_the_last_whole_step_of_both_and_exits_with_success(tmp_path, lesson):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    command = [sys.executable, str(HOUSE / "train.py"), *lessons(lesson, run, settings=["workers=1"])]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
    ranks = [subprocess.Popen(command, env=both | {"RANK": r, "LOCAL_RANK": r}, **how) for r in "01"]
    try:
        while steps_of(run) < 2:
            time.sleep(0.02)
            assert [rank.poll() for rank in ranks] == [None, None]
        os.killpg(ranks[1].pid, signal.SIGTERM)  # its worker too, as torchrun does
        assert [rank.wait(300) for rank in ranks] == [0, 0]
        steps = len(losses(run))
        assert f"step {steps} of" in ranks[0].stdout.read() and valid_checkpoints(run)[-1].name == f"step-{steps:06d}"
    finally:
        for rank in ranks:
            rank.kill()
