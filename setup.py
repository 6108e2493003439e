from setuptools import setup  # The metadata is in pyproject.toml.

setup()
