"""Everything that has to be measured on a GPU, by one command: `python -m bench.proof --part N`."""
