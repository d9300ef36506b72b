import raytrain2p.launch  # noqa: F401  sets the variables that Ray reads while it is imported
