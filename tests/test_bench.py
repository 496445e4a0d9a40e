"""Tests of bench/"""

import json
import os
import re
import shlex
import subprocess
import sys
from queue import SimpleQueue

import pytest
import torch

import bench.kernels
import bench.solvers
import bench.speed
import kernels
from conftest import HOUSE

PROSE = "\n".join(path.read_text() for path in (HOUSE / "README.md", *sorted(HOUSE.glob("docs/*.md"))))


def command(*words):
    """Run python with these words -> the process, its output in one string."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=HOUSE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_bench_commands_of_the_docs_parse_and_help_answers_before_torch():
    lines = set(re.findall(r"python -m (bench\.(?:kernels|speed|solvers) [^`\n#]*)", PROSE))
    for program, *words in map(shlex.split, lines):
        bench.parse_arguments(program, sys.modules[program].NAMES, "", words)
    assert len(lines) > 8
    told = command("-X", "importtime", "-m", "bench.speed", "--help").stdout
    assert "usage:" in told and "torch" not in told.split("usage:")[0]
    done = command("-c", "import sys; sys.modules['av'] = None; import bench.kernels, bench.speed, model")
    assert done.returncode == 0, done.stdout


def test_a_section_is_saved_beside_the_others_and_a_failed_row_fails_the_command(tmp_path):
    args = bench.parse_arguments("bench.speed", ["compile"], "", ["compile", "--out", str(tmp_path)])
    bench.save(tmp_path, "sm_90, compiled only", "older", [{"a": 1}], "bench.speed")
    rows = [{"s": float("nan"), "result": "pass"}, {"s": 0.5, "result": "spills"}]
    for some, code in ((rows, "1 rows failed"), (rows[:1], None)):
        with pytest.raises(SystemExit) as ended:
            bench.run("bench.speed", args, {"compile": lambda args: iter(some)})
        saved = json.loads((tmp_path / "sm-90-compiled-only.json").read_text())
        assert saved["older"]["rows"] == [{"a": 1}] and saved["compile"]["rows"][0]["s"] is None
        assert ended.value.code == code and len(saved["compile"]["rows"]) == len(some)


def test_the_hopper_kernel_compiles_without_a_spill(tmp_path):
    triton = pytest.importorskip("triton")
    if not os.path.exists(triton.knobs.nvidia.ptxas.path):
        pytest.skip("this triton has no ptxas")
    done = command("-m", "bench.kernels", "compile", "--only", "hopper", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "sm-90-compiled-only.json").read_text())["compile"]["rows"]
    assert done.returncode == 0 and row["spilled bytes"] == 0, done.stdout


def test_check_passes_a_configuration_and_fails_wrong_numbers_and_twins_agree(monkeypatch):
    pytest.importorskip("triton")
    module, config = sys.modules["kernels.attention"], (32, 32, 4, 1)
    monkeypatch.setattr(module, "usable", module.usable)
    monkeypatch.setattr(module, "CONFIGS", {name: [config] for name in module.CONFIGS})
    results = []
    for twist in (1.0, 1.1):
        monkeypatch.setitem(bench.kernels.ATTENTION, "ref", lambda q, k, v, t=twist: kernels.attention_ref(t * q, k, v))
        module.compiled.cache_clear()
        bench.kernels.check_one("attention_forward", config, 16, queue := SimpleQueue())
        results.append(queue.get()[1])
    module.compiled.cache_clear()
    assert results == ["pass", "wrong numbers"]
    rows = list(bench.kernels.norm_rows(1, (1, 2, 2), 2, torch.float32, (1, 8, 1, 2, 2)))
    assert [row["direction"] for row in rows] == ["forward", "backward"] * 4 + ["forward"]
    assert all(row["relative difference"] < 1e-5 for row in rows)


def test_the_roofline_adds_up():
    *parts, total = (row["ms"] for row in bench.speed.roofline(None))
    assert sum(parts) == pytest.approx(total) and 380 < total < 400
