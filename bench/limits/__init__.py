"""A step's time on seven cards, predicted from machine code: `python -m bench.limits`."""
