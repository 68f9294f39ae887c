"""Checks of what a live cluster needs of this machine, with advice on what is missing."""
