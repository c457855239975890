"""Which tests need the compiled kernels. Where they cannot run, pytest's summary says why."""

from __future__ import annotations

import pytest

from sessiond.kernels.native_library import BUILT

needs_build = pytest.mark.skipif(not BUILT, reason="the kernels were not compiled: no C compiler at install")
