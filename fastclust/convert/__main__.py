"""What ``python -m fastclust.convert`` runs."""

from fastclust import cli
from fastclust.convert.command import main

if __name__ == "__main__":
    cli.run(main)
