"""Tests of one module or one package each, in folders named like the packages."""
