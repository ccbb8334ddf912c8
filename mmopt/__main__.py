"""`python -m mmopt` is the command line."""

from mmopt.cli.main import main

main()
