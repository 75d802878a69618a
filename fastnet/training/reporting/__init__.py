"""What a run tells while it goes and leaves for later: console, messages, metrics, curves, traces, trackers."""
