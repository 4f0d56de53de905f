"""The command line, `constrained-growth` or `python -m constrained_growth`."""

import sys


def main() -> None:
    """Run the command line; says what to install where an extra is missing."""
    try:
        from constrained_growth.experiments.commands import app

        app()
    except ModuleNotFoundError as error:
        extra = "transformers" if error.name == "transformers" else "demo"
        sys.exit(f"{error.name} is missing: pip install 'constrained-growth[{extra}]'")


if __name__ == "__main__":
    main()
