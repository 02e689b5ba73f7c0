"""Writes stepdistill/assets/NOTICE.md: the licence of the data, what made each file, sha256 sums.

PYTHONPATH=. python tools/teacher/notice.py
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import common

MADE_BY = {
    "judge.safetensors": "train_judge.py",
    "critic.safetensors": "train_critic.py",
    "reference.npz": "measure.py",
    "teacher_statistics.json": "measure.py",
    "teacher_statistics.npz": "measure.py",
    "prompts/fashion.txt": "measure.py",
    "prompts/fashion_train.txt": "measure.py",
    "teacher": "train_autoencoder.py, encode_latents.py, train_unet.py, assemble.py",
    "flow_teacher_row.json": "teacher_row.py --flow",
    "flow_teacher": "encode_latents.py, train_flow.py, assemble.py --flow",
}

HEADER = """# Notice

The files below were made by the scripts of `tools/teacher/` from Fashion-MNIST, photographs of clothes,
Copyright (c) 2017 Zalando SE, https://tech.zalando.com, under the MIT licence (below). No photograph is contained
here; the networks and statistics derived from them are under this project's licence, Apache-2.0.

| File | Made by | sha256 |
|---|---|---|
"""

LICENCE = """
## The MIT License (MIT): Fashion-MNIST

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def rows(folder: Path) -> list[str]:
    """One table row per file, in the order of MADE_BY."""
    lines = []
    for name, script in MADE_BY.items():
        path = folder / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.exists():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                lines.append(f"| `{file.relative_to(folder).as_posix()}` | {script} | `{digest}` |")
    return lines


def main() -> None:
    (common.ASSETS / "NOTICE.md").write_text(HEADER + "\n".join(rows(common.ASSETS)) + "\n" + LICENCE)


if __name__ == "__main__":
    main()
