"""Build the lab's kernel and the MegaPipe module."""
