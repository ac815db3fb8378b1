"""What tells models apart: their configurations."""

import hashlib
import json
from typing import Any


def digest(transformer: Any) -> str:
    """Of all that its configuration says, but for private names."""
    public = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()[:8]
