"""The command line: the parser, and what becomes of errors. The commands are in ``vitdecomp_lens.commands``.

Results go to standard output, progress and errors to standard error. The exit code is 0 if all is well, 1 if a model
is not supported, a photograph could not be explained or a task of an evaluation failed, 2 if the request cannot be
carried out as it is.
"""

import argparse
import logging
from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console

from vitdecomp_lens.commands import align, collect, demo, evaluate, explain, interpret, report, verify
from vitdecomp_lens.commands.showing import say_error
from vitdecomp_lens.errors import VitDecompError

COMMANDS = (demo, verify, explain, report, collect, align, interpret, evaluate)  # as the help lists them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As after the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)  # libraries log that a model without weights has none
    try:
        code: int = options.run(options, errors)
    except VitDecompError as error:
        say_error(errors, error)
        return 2
    except KeyboardInterrupt:
        errors.print("Stopped.")
        return 130
    finally:
        logging.disable(logged)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitdecomp-lens", description=__import__("vitdecomp_lens").__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('vitdecomp-lens')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
