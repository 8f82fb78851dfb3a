"""The old place of names that scripts elsewhere import; they live in `upfit.checkpoint`. Goes with version 0.2."""

from upfit.checkpoint.side_files import SIDE_FILES
from upfit.checkpoint.source import STORY_FILES, WEIGHT_PATTERNS

__all__ = ["SIDE_FILES", "STORY_FILES", "WEIGHT_PATTERNS"]
