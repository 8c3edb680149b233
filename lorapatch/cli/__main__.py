"""``python -m lorapatch.cli``."""

from lorapatch.cli import main

main()
