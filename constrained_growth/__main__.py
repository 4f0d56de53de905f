"""The command line, `constrained-growth` or `python -m constrained_growth`."""

import sys

from constrained_growth._extras import extra_packages


def main() -> None:
    """Run the command line; where a package is missing it says what to install."""
    try:
        with extra_packages():
            from constrained_growth.experiments.commands import app

            app()
    except ModuleNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
