"""Files that come with the package: the embedded teachers, judge and critic, statistics, prompt lists."""

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
TEACHER = "builtin:teacher"
FLOW_TEACHER = "builtin:flow_teacher"
TEACHERS: Mapping[str, Path] = {TEACHER: FOLDER / "teacher", FLOW_TEACHER: FOLDER / "flow_teacher"}
"""What a model's path may say instead of a folder: the embedded teacher (SD's format), its flow-matching twin (SD3's)."""


def resolve(source: str) -> str:
    """`builtin:teacher` or `builtin:flow_teacher` -> its folder; anything else unchanged."""
    return str(TEACHERS.get(source, source))
