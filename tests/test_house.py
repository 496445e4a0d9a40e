"""Tests of the house itself"""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess

import pytest

import curate
import judge
import nano.__main__
import sample
import train
from bench import table
from conftest import HOUSE

HOUSE_FLOORS = (
    "kernels report stats qwen command",
    "parallel dit vae connectors media",
    "data lora sizing metrics ledger sampler",
    "load distil vlm",
    "model curators benchmarks",
    "checkpoint cache stages",
    "start",
    "sample train judge curate nano app",
    "bench",
    "conftest",
    "test_all",
)
FLOORS = {name: floor for floor, names in enumerate(HOUSE_FLOORS) for name in names.split()}


FILES = sorted(path.relative_to(HOUSE) for path in [*HOUSE.glob("*.py"), *HOUSE.glob("[a-z]*/*.py")])


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "tests"], ids=str)
def test_a_file_imports_only_from_floors_below_its_own(path):
    nodes, own = list(ast.walk(ast.parse((HOUSE / path).read_text()))), path.parts[0].removesuffix(".py")
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    for name in {name.split(".")[0] for name in imported} & FLOORS.keys() - {own}:
        assert FLOORS[name] < FLOORS[own], f"{path} imports {name}"


def test_the_readme_names_every_file_of_the_house():
    text = (HOUSE / "README.md").read_text()
    files = {path.parts[0] for path in FILES if path.parts[0] not in ("tests", "conftest.py")}
    assert not [name for name in files if f"`{name}`" not in text and f"`{name}/`" not in text]


PROSE = "\n".join(path.read_text() for path in (HOUSE / "README.md", *sorted(HOUSE.glob("docs/*.md"))))


def readme_commands(program):
    text = re.sub(r"\\\n\s*", "", PROSE)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if re.match(rf"(python|torchrun .*) {program}", line)
    ]


COMMANDS = {"sample.py": sample, "train.py": train, "judge.py": judge, "curate.py": curate, "-m nano": nano.__main__}


@pytest.mark.parametrize(
    "program, line", [(program, line) for program in COMMANDS for line in readme_commands(program)]
)
def test_the_readme_s_commands_parse(tmp_path, monkeypatch, program, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)  # --resume reads the run's arguments
    (tmp_path / "runs" / "mine" / "config.json").write_text('{"args": {"stage": 3, "preset": "lora"}, "began": {}}')
    words = shlex.split(line, comments=True)
    COMMANDS[program].parse_arguments(words[words.index(program.split()[-1]) + 1 :])


def test_the_readme_points_at_code_that_exists():
    pointers = re.findall(rf"`((?:{'|'.join(FLOORS)})\.[A-Za-z_.]+)`", PROSE)
    for pointer in pointers:
        module, *names = pointer.split(".")
        if names[-1] not in ("py", "jsonl"):  # a file's name
            assert functools.reduce(getattr, names, importlib.import_module(module)), pointer


def test_the_figures_of_readme_and_docs_are_those_of_the_committed_benchmark():
    quoted = 0
    for path in (HOUSE / "bench").glob("*.json"):
        for section, results in json.loads(path.read_text()).items():
            if section in ("dit", "vae", "memory", "roofline", "weights8", "few", "long"):
                quoted += 1
                assert table(results["rows"]) in PROSE, f"{section} of {path.name}: paste its table"
    assert quoted >= 5


@pytest.mark.parametrize("recipe", sorted(HOUSE.glob("runs/*.sh")), ids=lambda path: path.name)
def test_the_recipes_are_bash_whose_commands_parse(tmp_path, recipe):
    tell = 'python() { printf "%q " "$@"; echo; }; timeout() { shift; "$@"; }; torchrun() { shift 2; python "$@"; }\n'
    env = {**os.environ, "out": str(tmp_path), "assets": str(tmp_path), "cached": "1", "seeds": "0"}
    done = subprocess.run(["bash", "-c", f"{tell}. {recipe}"], capture_output=True, text=True, env=env)
    programs = {
        line: next((p for p in COMMANDS if line.startswith(f"{p} ")), None) for line in done.stdout.splitlines()
    }
    assert done.returncode == 0 and any(programs.values()), done.stderr
    for line, program in programs.items():
        if program:
            COMMANDS[program].parse_arguments(shlex.split(line)[len(program.split()) :])


@pytest.mark.parametrize("program", COMMANDS)
def test_every_flag_of_a_command_is_read(program):
    others = {"-m nano": HOUSE.glob("nano/*.py"), "curate.py": HOUSE.glob("curators/*.py")}
    more = others.get(program, [HOUSE / "stages.py", HOUSE / "start.py"])
    files = [*more, *([HOUSE / program] if program[0] != "-" else [])]
    text = "".join(path.read_text() for path in files)
    flags = re.findall(r'(?:add|flag)\(\s*(?:"-\w", )?"--([\w-]+)"', text)
    assert flags and all(re.search(rf"args\.{flag.replace('-', '_')}\b", text) for flag in flags)
