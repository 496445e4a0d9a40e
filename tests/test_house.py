"""Tests of the house itself"""

import ast
import functools
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import curate
import judge
import nano
import sample
import train
from conftest import HOUSE
from kernels.bench import table

FLOORS = {
    "kernels": 0, "dit": 1, "vae": 1, "connectors": 1, "media": 1, "data": 2, "load": 2, "world": 2, "metrics": 2,
    "vlm": 2, "judges": 2, "report": 1, "model": 3, "sample": 4, "train": 4, "judge": 4, "curate": 4, "nano": 4, "conftest": 5,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(HOUSE.glob("*.py")), ids=lambda path: path.name)
def test_a_file_imports_only_from_floors_below_its_own(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    for name in {name.split(".")[0] for name in imported} & FLOORS.keys():
        assert FLOORS[name] < FLOORS[path.stem], f"{path.name} imports {name}"


def readme_commands(program):
    text = re.sub(r"\\\n\s*", "", (HOUSE / "README.md").read_text())
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if re.match(rf"(python|torchrun .*) {program}", line)
    ]


COMMANDS = (sample, train, judge, curate, nano)


@pytest.mark.parametrize("command, line", [(c, line) for c in COMMANDS for line in readme_commands(f"{c.__name__}.py")])
def test_the_readme_s_commands_parse(command, line):
    words = shlex.split(line, comments=True)
    command.parse_arguments(words[words.index(f"{command.__name__}.py") + 1 :])


def test_the_readme_points_at_code_that_exists():
    pointers = re.findall(rf"`((?:{'|'.join(FLOORS)})\.[A-Za-z_.]+)`", (HOUSE / "README.md").read_text())
    for pointer in pointers:
        module, *names = pointer.split(".")
        if names[-1] not in ("py", "jsonl"):  # a file's name
            assert functools.reduce(getattr, names, importlib.import_module(module)), pointer


def test_the_readme_s_figures_are_those_of_the_committed_benchmark():
    readme, quoted = (HOUSE / "README.md").read_text(), 0
    for path in (HOUSE / "bench").glob("*.json"):
        for section, results in json.loads(path.read_text()).items():
            if section in ("dit", "vae", "memory"):
                quoted += 1
                assert table(results["rows"]) in readme, f"{section} of {path.name}: paste its table"
    assert quoted >= 3


@pytest.mark.parametrize("machine", ["h100", "cpu"])
def test_the_recipes_are_bash_whose_commands_parse(tmp_path, capsys, machine):
    nano.main(["recipe", machine])
    tell = 'python() { printf "%q " "$@"; echo; }; timeout() { shift; "$@"; }; torchrun() { shift 2; python "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", tell + capsys.readouterr().out], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines.pop() == ["0", "minutes"] and len(lines) == 14
    for program, *words in lines:
        importlib.import_module(Path(program).stem).parse_arguments(words)


@pytest.mark.parametrize("command", (sample, train, curate, nano), ids=lambda command: command.__name__)
def test_every_flag_of_a_command_is_read(command):
    text = (HOUSE / f"{command.__name__}.py").read_text()
    flags = re.findall(r'add\(\s*(?:"-\w", )?"--([\w-]+)"', text)
    assert flags and all(re.search(rf"args\.{flag.replace('-', '_')}\b", text) for flag in flags)
