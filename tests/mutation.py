"""Plugin of `make mutation`: hypothesis draws the same examples in every run, and does not shrink what fails."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True)
settings.load_profile("mutation")
