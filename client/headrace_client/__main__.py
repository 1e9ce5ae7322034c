"""`python -m headrace_client` is `headrace`."""

from headrace_client.cli import main

main()
