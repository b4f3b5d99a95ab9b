"""What previews of the pocket bundle cost."""
