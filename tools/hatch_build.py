"""Build hook: puts the models that the repository ships into the wheel, as `kvturbo/models/<name>`.

An editable install reads them from the repository's own `models/` folder, so nothing is copied for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ModelsBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for config in sorted(Path(self.root, "models").glob("kvturbo-*/config.json")):
            build_data["force_include"][str(config.parent)] = f"kvturbo/models/{config.parent.name}"
