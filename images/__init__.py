"""The guest's programs and its initramfs."""
