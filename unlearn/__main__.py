"""`python -m unlearn`."""

from unlearn.cli import main

main()
