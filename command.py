"""What the commands share: numbers as flags, and failures as one line. Imports no torch, so that --help is quick."""

import argparse
import math
import os
import sys
from contextlib import contextmanager, suppress


def number(low, high=math.inf, kind=int):
    """A type for argparse: a finite number from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected a number from {low}{f' to {high}' if high < math.inf else ''}")
        return value

    return number


def is_out_of_memory(error):
    """CUDA's own where not even its context fits, torch's; cuDNN swallows a workspace's and then finds no engine."""
    return any(words in str(error) for words in ("out of memory", "unable to find an engine"))


@contextmanager
def one_line(program, interrupted="interrupted", memory="take a larger card, or --device cpu"):
    """Foreseeable failures of the block end the program with one line on stderr and an exit code that is not 0."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}", file=sys.stderr, flush=True)
        with suppress(OSError):  # a closed pipe
            sys.stdout.flush()
        os._exit(130)  # a plain exit would wait for threads, and these for a slow server
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{program}: out of GPU memory; {memory}")
