"""`python -m autolite`."""

from autolite.cli import main

main()
