"""`python -m hf_gradclip`, as in `accelerate launch -m hf_gradclip run --clip adaptive -- script.py`."""

import sys

from hf_gradclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
