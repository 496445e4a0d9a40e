"""Run sections of measurements, print a table, keep the rows in bench/<device>.json.

    python -m bench.kernels    kernels: do they compile, compute the right numbers, how fast
    python -m bench.speed      the model beside diffusers, 8-bit weights, memory and roofline
    python -m bench.solvers    fewer forwards, long clips and masks on nano

Rows are saved one by one: what stops early (`timeout 150 python -m bench...` ends it with its processes) keeps what it
measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
COMPUTED = ("memory", "roofline", "weights8")  # sections that are the same on every machine


def parse_arguments(program, sections, doc, argv=None):
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="+", choices=sections, help="sections to run")
    add("--repeat", type=int, default=7, help="turns of each measurement (default %(default)s)")
    add("--only", default="", metavar="TEXT", help="check, compile: only kernels with TEXT in their name")
    add("--arch", type=int, default=90, help="compile: compute capability, e.g. 80, 89, 90 (default %(default)s)")
    add("--clips", type=int, default=6, help="few, long, mask: moving clips (default %(default)s)")
    add("--out", type=Path, default=HOUSE / "bench", help="folder of the results (default: bench/ of this repository)")
    return parser.parse_args(argv)


def run(program, args, sections):
    """Print and save each section; sections: name -> function of args that yields rows, dicts of equal keys."""
    from bench.measure import device_name

    failed = 0
    for what in args.what:
        device = "computed" if what in COMPUTED else device_name()
        device = f"sm_{args.arch}, compiled only" if what == "compile" else device
        rows, started = [], time.time()
        try:
            for row in sections[what](args):
                rows.append(row)
                path = save(args.out, device, what, rows, program)
        finally:
            if rows:
                print(f"{table(rows)}\n{what}: {len(rows)} rows, {time.time() - started:.0f} s, {path}\n", flush=True)
        failed += sum(row.get("result", "pass") != "pass" for row in rows)
    sys.exit(f"{failed} rows failed" if failed else None)


def save(folder, device, what, rows, program):
    """Replace one section of the device's file, atomically."""
    import torch

    slug = re.sub("[^a-z0-9]+", "-", re.sub(r"\(r\)|processor", "", device.lower())).strip("-")
    path = folder / f"{slug}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    date, command = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), f"python -m {program} {' '.join(sys.argv[1:])}"
    results[what] = {
        "date": date,
        "device": device,
        "torch": torch.__version__,
        "command": command,
        "rows": rows,
    } | clocks()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1).replace("NaN", "null") + "\n")
    os.replace(temporary, path)
    return path


def clocks():
    """MHz, watts and degrees of each GPU as a row is saved: a throttled card shows here."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return {"clocks": subprocess.check_output(query, text=True, timeout=9).splitlines()}
    except (OSError, subprocess.SubprocessError):
        return {}


def table(rows):
    """Rows, dicts with the same keys, as a Markdown table."""
    cells = [list(rows[0])] + [[shown(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells)


def shown(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
