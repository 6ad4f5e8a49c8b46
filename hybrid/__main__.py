"""Where the `hybrid` command and `python -m hybrid` begin."""

from hybrid import process


def main() -> None:
    """Run the command line of this process, and end it."""
    process.open_streams()
    process.take_ctrl_c()
    from hybrid import cli  # only now: importing takes longer than a finger needs for Ctrl-C

    process.leave(cli.run())


if __name__ == "__main__":
    main()
