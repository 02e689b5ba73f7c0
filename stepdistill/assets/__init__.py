"""Files that come with the package: the embedded teacher, its judge and critic, statistics, prompt lists."""

from pathlib import Path

FOLDER = Path(__file__).parent
TEACHER = "builtin:teacher"


def resolve(source: str) -> str:
    """`builtin:teacher` -> its folder; anything else unchanged."""
    return str(FOLDER / "teacher") if source == TEACHER else source
