"""The command line, `constrained-growth` or `python -m constrained_growth`."""

import sys


def main() -> None:
    """Run the command line; says what to install where its extra is missing."""
    try:
        from constrained_growth.experiments.commands import app
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install 'constrained-growth[demo]'")
    app()


if __name__ == "__main__":
    main()
