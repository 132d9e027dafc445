"""`python -m quire.cli`."""

from quire.cli.app import main

main()
