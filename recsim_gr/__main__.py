"""``python -m recsim_gr``: the same as the command ``recsim-gr``."""

from recsim_gr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
