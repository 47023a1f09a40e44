"""What ``python -m fastclust.compare`` runs."""

from fastclust import cli
from fastclust.compare.command import main

if __name__ == "__main__":
    cli.run(main)
