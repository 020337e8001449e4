"""Floor 6: the command line, one short file per verb."""


def main() -> None:
    """Run `opsin` with the arguments of this process, and end the process."""
    import sys

    from opsin.cli.app import run

    sys.exit(run(sys.argv[1:]))
