"""Entry point: `python -m tools.make_sample --output finetune.jsonl`."""

import sys

from tools.make_sample.sample import main

if __name__ == "__main__":
    sys.exit(main())
