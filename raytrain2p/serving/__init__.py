"""A trained assistant behind HTTP."""
