"""What a run says of itself: JSONL events and metrics, a meter, W&B."""
