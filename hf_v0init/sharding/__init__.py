"""What this process holds of a tensor, and how processes agree."""
