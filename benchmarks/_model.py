"""The model in this process, to compute or read what a stopped daemon left."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from _bench import arguments
from transformers.utils import logging as transformers_logging

from sessiond import modelstore
from sessiond.model import Model


def data_dir_arguments(doc: str | None) -> argparse.ArgumentParser:
    """`arguments`, and the data directory of a stopped daemon."""
    parser = arguments(doc)
    parser.add_argument("data_dir", type=Path)
    return parser


def load_model(name: str) -> Model:
    """The model as a daemon computes with it: on all cores."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    return Model.load(modelstore.resolve(name).path)
