"""`trigger-opt contrast`: exit codes, and one line for a user's mistake."""

import errno
import shlex
import sys

from trigger_opt.contrast.options import parse
from trigger_opt.contrast.run import run
from trigger_opt.errors import UserError


def main(arguments: list[str]) -> int:
    """Exit code: 0 whatever was found or could not be decided, 2 for a mistake of the user, 130 after Ctrl-C."""
    try:
        run(parse(arguments), command=f"trigger-opt contrast {shlex.join(arguments)}")
    except UserError as error:
        return _stop(str(error), 2)
    except KeyboardInterrupt:
        return _stop("interrupted; nothing was compared", 130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _stop(f"no space left on the disk of {error.filename or 'the folder'}; give another --out", 2)
    return 0


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
