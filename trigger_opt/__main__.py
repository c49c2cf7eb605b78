"""`python -m trigger_opt +experiment=NAME`, commands (`transfer`, `collect`, …), and the script `trigger-opt`."""

import sys


def main() -> None:
    """A run, or a command, which starts without torch and Hydra."""
    if sys.argv[1:2] == ["transfer"]:
        from trigger_opt.transfer.commands import main as transfer

        sys.exit(transfer(sys.argv[2:]))
    if sys.argv[1:2] == ["candidates"]:
        from trigger_opt.candidates.commands import main as candidates

        sys.exit(candidates(sys.argv[2:]))
    if sys.argv[1:2] == ["collect"]:
        from trigger_opt.collect.commands import main as collect

        sys.exit(collect(sys.argv[2:]))
    if sys.argv[1:2] == ["contrast"]:
        from trigger_opt.contrast.commands import main as contrast

        sys.exit(contrast(sys.argv[2:]))
    from trigger_opt.entry import main as run

    run()


if __name__ == "__main__":
    main()
