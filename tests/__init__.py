"""Tests, one file per module and some across them."""
