"""`python -m flyball.app` is `flyball`."""

from flyball.app.cli import main

main()
