"""``python -m pipeline``, the same as the command ``clip-pipeline``."""

from pipeline.command import main

if __name__ == "__main__":
    main()
