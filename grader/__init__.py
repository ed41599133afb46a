"""Boot a kernel, drive it from outside, count what it does, and grade it."""
