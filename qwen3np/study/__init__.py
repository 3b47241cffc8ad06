"""What lets one watch the model at work."""
