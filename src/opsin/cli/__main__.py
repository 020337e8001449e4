"""`python -m opsin.cli`."""

from opsin.cli import main

main()
