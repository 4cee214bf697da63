"""``python -m flash_attn_ext COMMAND``, installed as ``flash-attn-ext``: doctor, explain, kernels, bench."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ._version import __version__

_COMMANDS = {  # name: what it does; the module of that name in cli/ is imported only when it is asked for
    "doctor": "say what is installed and built, and check that it computes the right thing",
    "explain": "which kernels a call runs, with tile, workspace and reason; or why none does",
    "kernels": "what this binary can run, as the table of the README",
    "bench": "time this package and its peers beside each other",
}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the ``chosen`` command alone: the others' modules stay unread."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_ext",
        description="Exact attention without the S x S matrix: what this build is, what it runs, how fast it is.",
        epilog="`python -m flash_attn_ext COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"flash_attn_ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f".cli.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Command and options; default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0, or 1 where a command found what it is to find (a failed check, no kernel, a stale table).

    Raises
    ------
    SystemExit
        From argparse: status 2 for wrong options, 0 for ``--help`` and ``--version``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _parser(chosen)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except argparse.ArgumentTypeError as error:  # options that do not go together
        parser.error(str(error))
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
