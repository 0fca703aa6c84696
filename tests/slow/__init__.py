"""Sweeps over many cases. `make` targets run them whole, and the tests a part of each."""
