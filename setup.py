"""The compiled kernels; everything else is in pyproject.toml, which setuptools reads beside this."""

from setuptools import setup

setup(cffi_modules=["kernels/native/build.py:ffibuilder"])
