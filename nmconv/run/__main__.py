"""Entry point of ``python -m nmconv.run`` and ``torchrun -m nmconv.run``."""

from nmconv.run.command import main

if __name__ == "__main__":
    main()
