"""`python -m trigger_opt.contrast`, the same as `trigger-opt contrast`."""

import sys

from trigger_opt.contrast.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
