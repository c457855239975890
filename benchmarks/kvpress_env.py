"""Make kvpress's environment under .cache/kvpress-env if it is not there, and run kvpress_peer.py in it.

Without --texts on conversations as fidelity.py replays them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from _bench import arguments
from _chat_text import conversations

from sessiond import modelstore
from sessiond.model import load_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "kvpress-env"
# Exact, so that no newer torch with another device's libraries is taken.
PINNED = ("kvpress==0.5.5", "torch==2.13.0", "transformers==5.2.0")
PROMPT = 32


def python() -> Path:
    """The environment's interpreter; the first call makes it, over a network. Raises CalledProcessError."""
    found = FOLDER / "bin" / "python"
    if not (FOLDER / ".installed").is_file():
        venv.create(FOLDER, with_pip=True)
        install = [str(found), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *PINNED]
        subprocess.run(install, check=True, stdout=sys.stderr)
        (FOLDER / ".installed").touch()
    return found


def environment() -> dict[str, str]:
    """Ours without what points python at our code; offline, as the model is on disk."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**ours, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--texts", type=Path, help="JSON file as kvpress_peer.py reads it")
    parser.add_argument("--data", type=Path, help="folder with mtbench101.jsonl; without it, made-up sentences")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--answer", type=int, default=96)
    parser.add_argument("--budget", type=int, default=246, help="tokens of history that stay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answers", action="store_true", help="tell each answer's scores too")
    options = parser.parse_args()
    path = modelstore.resolve(options.model).path
    with tempfile.TemporaryDirectory() as folder:
        file = options.texts or Path(folder, "texts.json")
        if options.texts is None:
            tokenizer, n_tokens = load_tokenizer(path), options.context + options.answer
            texts = conversations(tokenizer, options.data, options.conversations, n_tokens, options.seed)
            n = options.context + 1  # an answer's first token follows the prompt at once: not scored there
            file.write_text(json.dumps([{"ids": ids, "n_context": n, "prompt": PROMPT + 1} for ids in texts]))
        peer = Path(__file__).with_name("kvpress_peer.py")
        command = [str(python()), str(peer), "--path", str(path), "--texts", str(file), "--budget", str(options.budget)]
        command += ["--answers"] if options.answers else []
        sys.exit(subprocess.run(command, env=environment(), check=False).returncode)


if __name__ == "__main__":
    main()
