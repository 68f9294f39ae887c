"""What this machine has for a live cluster, and what to do about what it lacks."""
