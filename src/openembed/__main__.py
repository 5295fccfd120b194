"""``python -m openembed``: the command line, as torchrun and accelerate launch it."""

from openembed.cli import main

if __name__ == "__main__":
    main()
