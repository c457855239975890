"""Generated from proto/sessiond/v1 by `python proto/generate.py`. Do not edit."""
