"""Checks of a machine for all that a live cluster needs, with advice on what is missing."""
