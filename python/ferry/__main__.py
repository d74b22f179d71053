"""`python -m ferry`, and the script `ferry`: the command line, in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ferry ARGUMENTS...` and returns its exit status: 0, 1 for a failure, 2 for wrong use,
    130 where it was stopped. `arguments` default to the program's own.
    """
    from ferry import _C

    sys.stdout.flush()
    sys.stderr.flush()
    return _C.run_command_line(list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
