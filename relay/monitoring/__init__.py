"""What is told to people and programs that watch: health, metrics, probes."""
