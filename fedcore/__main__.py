"""`python -m fedcore` is the command `fedcore`."""
from fedcore.cli import main

main()
