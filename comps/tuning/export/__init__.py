"""What leaves the library: sub-adapters and merged models."""
