"""Whisper's audio encoder as one MAX Graph. Refuses to send telemetry unless the user set it."""

import os

os.environ.setdefault("MODULAR_TELEMETRY_ENABLED", "0")
