"""`python -m pyengine`."""

from pyengine.cli import main

main()
