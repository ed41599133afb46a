"""Pictures of what was published and of what is measured here, in notebooks and without them."""
