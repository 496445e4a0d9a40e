"""What every command does alike: numbers on the command line, and failures as one line. Imports no torch."""

import argparse
import math
import sys


def at_least(least, kind=int):
    """A type for argparse: a finite number of at least so much."""

    def number(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number of at least {least}")
        return value

    return number


def is_out_of_memory(error):
    """cuDNN swallows the OutOfMemoryError of a convolution's workspace: it then finds no engine."""
    return any(words in str(error) for words in ("out of memory", "unable to find an engine"))


def run(name, main, interrupted="interrupted", memory="take a smaller input"):
    """main(), with every foreseeable failure as one line on stderr and an exit code other than 0."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: {interrupted}")
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{name}: out of GPU memory; {memory}")
