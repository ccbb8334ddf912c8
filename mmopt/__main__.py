"""`python -m mmopt` is the command line."""

from mmopt.cli.main import main

if __name__ == "__main__":
    main()
