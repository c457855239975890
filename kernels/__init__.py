"""Kernels: one operation a file, a plain torch or numpy reference beside each compiled twin in `native/`."""
