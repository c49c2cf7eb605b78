"""`python -m trigger_opt +experiment=NAME`, `python -m trigger_opt transfer …`, and the script `trigger-opt`."""

import sys


def main() -> None:
    """A run, or a command on the transfer ledger, which starts without torch and Hydra."""
    if sys.argv[1:2] == ["transfer"]:
        from trigger_opt.transfer.commands import main as transfer

        sys.exit(transfer(sys.argv[2:]))
    from trigger_opt.entry import main as run

    run()


if __name__ == "__main__":
    main()
