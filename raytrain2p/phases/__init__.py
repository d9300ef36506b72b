"""The two phases. They never import each other: the artifact is all that they share."""
