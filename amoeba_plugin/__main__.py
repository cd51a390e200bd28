"""``python -m amoeba_plugin``: the same as the command ``amoeba``."""

from amoeba_plugin.cli import main

if __name__ == "__main__":
    main()
