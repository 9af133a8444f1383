"""`python -m pruneforge`."""

from pruneforge.cli import main

main()
