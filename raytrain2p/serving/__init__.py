"""A trained assistant at work on Ray: behind HTTP, and over many records on many workers."""
