"""Kernels: one operation a file, a plain torch reference beside each fast twin. The first arrives with the policies."""
