"""Measurements as ratios, both sides interleaved in one process. Nothing else imports this room."""
